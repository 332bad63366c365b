import os
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "s3prl_metaperser" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
SUBMITIT = "submitit>=1.5,<2"

# With "stock", s3prl's own `python -m s3prl.run_downstream` works: s3prl 0.4 does not import with torchaudio 2.9 or
# huggingface_hub 1, and torch and transformers go with these two. With "newest", only this package's launcher works,
# `python -m s3prl_metaperser.run_downstream`: METAPERSER_STACK=newest pip install . (an extra could not say so, as
# extras add requirements and lift none). Both end where tests/stacks.sh has passed. torchaudio 2.11 no longer
# says which torch it needs, and does not load with the newest.
STACKS = {
    "stock": ["torch>=2.4,<2.9", "torchaudio>=2.4,<2.9", "huggingface_hub>=0.23,<1", "transformers>=4.41,<5"],
    "newest": ["torch>=2.4,<2.10", "torchaudio>=2.4,<2.10", "huggingface_hub>=0.23,<3", "transformers>=4.41,<6"],
}
STACK = os.environ.get("METAPERSER_STACK", "stock")
if STACK not in STACKS:
    raise SystemExit(f"METAPERSER_STACK={STACK}: expected {' or '.join(STACKS)}")

setup(
    name="s3prl-metaperser",
    version=VERSION if STACK == "stock" else f"{VERSION}+{STACK}",
    description="Few-shot, listener-personalised speech emotion recognition by meta-learning, as an s3prl downstream",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # torch below 2.9 has no wheels for Python 3.14.
    python_requires=">=3.10,<3.14",
    # s3prl's runner finds a downstream by the module name s3prl.downstream.NAME.expert, and the configs are kept at the
    # top of the repository, where s3prl's users look for them: both are installed under the names they are read by.
    packages=[
        *find_packages(include=["s3prl_metaperser", "s3prl_metaperser.*"]),
        "s3prl.downstream.metaperser",
        "metaperser",
        "s3prl_metaperser.downstream_configs",
    ],
    package_dir={
        "metaperser": "s3prl_metaperser/metaperser_api",
        "s3prl.downstream.metaperser": "s3prl_metaperser/s3prl_downstream",
        "s3prl_metaperser.downstream_configs": "downstream_configs",
    },
    package_data={
        "s3prl_metaperser": ["py.typed"],
        "s3prl_metaperser.metaperser_api": ["py.typed"],
        "metaperser": ["py.typed"],
        "s3prl_metaperser.downstream_configs": ["*.yaml"],
        "s3prl_metaperser.calibration": ["page/*.jinja", "page/files/*"],
        "s3prl_metaperser.experiments": ["*.jinja"],
        "s3prl_metaperser.publishing": ["*.jinja"],
        "s3prl_metaperser.portrait": ["*.jinja"],
        "s3prl_metaperser.s3prl_export": ["*.jinja", "*.patch"],
    },
    install_requires=[
        "s3prl>=0.4.18,<0.5",
        *STACKS[STACK],
        "tensorboardX>=2.6.1,<3",  # what s3prl's runner imports without declaring it
        "higher>=0.2.1,<0.3",
        "jinja2>=3.1,<4",
        "matplotlib>=3.8,<4",
        "numpy>=1.26,<3",
        "pandas>=2.2,<4",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "safetensors>=0.4.1,<1",
        "scikit-learn>=1.4,<2",
        "scipy>=1.13,<2",
        "soundfile>=0.12",
        "starlette>=0.40,<2",
        "tqdm>=4.66",
        "uvicorn>=0.30,<1",
    ],
    extras_require={
        "slurm": [SUBMITIT],
        "test": [
            "httpx2>=2,<3",
            "hypothesis>=6.100",
            "mypy>=2.4,<2.5",
            "packaging>=24",
            "playwright>=1.50,<2",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            # Builds wheels by itself from 70.1 on; the tests build one in this environment.
            "setuptools>=70.1",
            SUBMITIT,
            "tensorboard>=2.16",
        ],
    },
    entry_points={"console_scripts": ["metaperser = s3prl_metaperser.cli:main"]},
    zip_safe=False,
)
