"""The command line of this room: ``metaperser export-s3prl``."""

from __future__ import annotations

import argparse

from s3prl_metaperser.argument_types import given_path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``export-s3prl`` to a command line.

    Args:
        subparsers: of the main parser. The command sets ``run``, a function from the parsed arguments to an exit code.
    """
    parser = subparsers.add_parser(
        "export-s3prl",
        help="write the downstream as a folder of s3prl's own, to contribute it",
        description="Write downstream/metaperser as s3prl would hold it: a folder that works in a clone of s3prl "
        "without this package. It is made from this package's own modules, with README.md, config.yaml, "
        "requirements.txt and, for s3prl's runner, bind.patch and resume.patch.",
    )
    parser.add_argument(
        "directory",
        type=given_path,
        metavar="DIR",
        help="a clone of s3prl or its package folder s3prl/, which gets the folder in its place; in any other DIR it "
        "becomes DIR/downstream/metaperser",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``metaperser export-s3prl``."""
    from s3prl_metaperser.s3prl_export import folder

    files = folder.contents()
    target = folder.destination(args.directory)
    folder.write(target, files, args.overwrite)
    package = target.parent.parent
    where = f"in {package}" if (package / "hub.py").is_file() else "in the package folder of s3prl that it is copied to"
    print(f"wrote {len(files)} files to {target}")
    print(f"next, {where} (README.md says more):")
    print("  python3 -m pip install -r downstream/metaperser/requirements.txt")
    print("  python3 -m s3prl.downstream.metaperser.prepare iemocap IEMOCAP_full_release --out data/corpus")
    print("  python3 run_downstream.py -n ssl_e -m train -u wavlm_base -d metaperser")
    return 0
