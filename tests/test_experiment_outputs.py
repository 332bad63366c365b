"""What an experiment leaves for people, against numbers worked out by hand and against a reader of each format."""

import base64
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments import figures, report, significance, tables
from s3prl_metaperser.experiments.table_formats import escape_latex, markdown
from s3prl_metaperser.publishing.figures import write_figure
from s3prl_metaperser.results_file import FAILURE_COLUMNS, RESULT_COLUMNS, read_episodes

METRICS = ["maF1", "miF1", "UA"]


def results(system, values, scenario="seen", fold=1, shots=4, upstream="fbank_no_cmvn", diverged=None):
    """Rows of results.csv, an episode each: maF1 is the value, miF1 10 and UA 50 above it; the step it diverged at."""
    return pd.DataFrame(
        {
            **{"system": system, "scenario": scenario, "upstream": upstream, "scope": "linear"},
            **{"test_annotator": f"E{fold}", "episode": range(len(values)), "shots": shots, "queries": 8},
            **{"maF1": values, "miF1": np.add(values, 10), "UA": np.add(values, 50), "fold": fold},
            "diverged_at_step": pd.array(diverged or [None] * len(values), dtype="Int64"),
        }
    )


def grid(text):
    """The cells of each line of a Markdown table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


# Tables


def test_a_summary_is_mean_and_population_deviation_over_episodes():
    both = pd.concat([results("A", [10.0, 14.0]), results("A", [30.0], shots=8)])
    (row,) = tables.summarise(both[both["shots"] == 4]).to_dict("records")
    assert row["episodes"] == 2
    assert [row[name] for name in ("maF1", "maF1_std", "UA", "UA_std")] == [12, 2, 62, 2]
    by_shots = tables.summarise(both, by=["system", "shots"])
    assert by_shots[["shots", "episodes", "maF1"]].to_numpy().tolist() == [[4, 2, 12], [8, 1, 30]]


def test_the_best_is_bold_the_reference_apart_and_what_is_missing_a_dash(tmp_path):
    rows = [
        *(results("All labels", [90.0, 90.0]), results("All labels", [90.0], "unseen")),
        *(results("Few", [10.0, 14.0]), results("Few", [9.0], "unseen")),
        results("Meta-PerSER", [30.0, 30.04]),
    ]
    tables.write_tables(pd.concat(rows), tmp_path, "t", ["A note."], ["All labels"], {"Few": {}, "Broken": {}})
    text = (tmp_path / "t.md").read_text()
    assert grid(text)[2:] == [
        ["Few", "12.0 ± 2.0", "22.0 ± 2.0", "62.0 ± 2.0", "**9.0 ± 0.0**", "**19.0 ± 0.0**", "**59.0 ± 0.0**"],
        ["Broken", *"––––––"],
        ["Meta-PerSER", "**30.0 ± 0.0**", "**40.0 ± 0.0**", "**80.0 ± 0.0**", *"–––"],
        ["*All labels*", *(f"*{v}.0 ± 0.0*" for v in (90, 100, 140, 90, 100, 140))],
    ]
    assert text.endswith("\nA note.\n")
    numbers = pd.read_csv(tmp_path / "t.csv")
    assert numbers.set_index(["system", "scenario"]).loc[("Meta-PerSER", "seen"), "maF1"] == 30.02
    assert numbers.loc[numbers["reference"], "system"].unique().tolist() == ["All labels"]


def test_means_that_look_equal_are_both_bold(tmp_path):
    table = tables.write_tables(pd.concat([results("A", [30.01]), results("B", [30.04])]), tmp_path, "t")
    assert [row.cells[1].bold for row in table.blocks[0].rows] == [True, True]


def test_a_system_measured_on_fewer_episodes_is_marked_and_not_bold(tmp_path):
    table = tables.write_tables(pd.concat([results("A", [10.0, 20.0]), results("B", [20.0])]), tmp_path, "t")
    assert [row.cells[1] for row in table.blocks[0].rows] == [
        tables.Cell("15.0 ± 5.0", bold=True),
        tables.Cell("† 20.0 ± 0.0"),
    ]
    assert "B, seen: 1 of 2" in markdown(table)


def test_a_system_of_which_episodes_failed_is_marked_and_they_count(tmp_path):
    rows = [
        results("A", [30.0, 0.0], diverged=[None, 3]),
        results("B", [10.0, 10.0]),
        results("C", [0.0], diverged=[0]),
    ]
    table = tables.write_tables(pd.concat(rows), tmp_path, "t")
    assert [row.cells[1] for row in table.blocks[0].rows] == [
        tables.Cell("‡ 15.0 ± 15.0", bold=True),
        tables.Cell("10.0 ± 0.0"),
        tables.Cell("†‡ 0.0 ± 0.0"),
    ]
    assert "score 0: A, seen: 1 of 2; C, seen: 1 of 1" in markdown(table)
    assert r"$\ddagger$ 15.0 $\pm$ 15.0" in (tmp_path / "t.tex").read_text()
    assert pd.read_csv(tmp_path / "t.csv")["failed"].tolist() == [1, 0, 1]


def test_failures_are_of_the_episodes_beside_them_or_refused(tmp_path):
    rows = results("A", [30.0, 0.0, 10.0], diverged=[None, 3, None])
    paths = tmp_path / "results.csv", tmp_path / "failures.csv"
    for path, columns in zip(paths, (RESULT_COLUMNS, FAILURE_COLUMNS), strict=True):
        rows.dropna(subset=columns).to_csv(path, columns=columns, index=False)
    assert read_episodes(*paths)["diverged_at_step"].tolist() == [pd.NA, 3, pd.NA]
    named = paths[1].read_text().splitlines()
    for faulty in ([*named, named[1]], [named[0], named[1].replace(",1,4,8,", ",7,4,8,")]):
        paths[1].write_text("\n".join(faulty))
        with pytest.raises(MetaPerSERError, match=r"failures\.csv: its episodes are not those of results\.csv"):
            read_episodes(*paths)
    paths[1].unlink()
    assert read_episodes(*paths)["diverged_at_step"].isna().all()


def test_upstreams_and_shots_are_never_averaged(tmp_path):
    rows = [results("A", [10.0]), results("A", [20.0], upstream="wavlm_base"), results("A", [30.0], shots=8)]
    table = tables.write_tables(pd.concat(rows), tmp_path, "t")
    assert [(block.title, block.rows[0].cells[1].text) for block in table.blocks] == [
        ("fbank_no_cmvn, K = 4", "10.0 ± 0.0"),
        ("wavlm_base, K = 4", "20.0 ± 0.0"),
        ("fbank_no_cmvn, K = 8", "30.0 ± 0.0"),
    ]


def test_latex_has_booktabs_check_marks_and_nothing_unescaped(tmp_path):
    rows = {"50% of A_B": {"INI": "✓", "DA": ""}}
    everything = pd.concat([results("50% of A_B", [10.0]), results("[Top]", [30.0])])
    tables.write_tables(everything, tmp_path, "t_1", [r"1 & 2 # $3 {4} ~5 ^6 \7 < |8|"], ["[Top]"], rows)
    lines = (tmp_path / "t_1.tex").read_text().splitlines()
    header = lines.index(r" &  &  & \multicolumn{3}{c}{seen} \\")
    assert lines[header + 1] == r"\cmidrule(lr){4-6}"
    assert (
        r"50\% of A\_B & \checkmark{} &  & \textbf{10.0 $\pm$ 0.0} & \textbf{20.0 $\pm$ 0.0} & "
        r"\textbf{60.0 $\pm$ 0.0} \\"
    ) in lines
    reference = next(place for place, line in enumerate(lines) if line.startswith(r"\textit{{[}Top]}"))
    assert lines[reference - 1] == r"\midrule"
    assert r"\textbf" not in lines[reference]
    assert lines[-2].endswith(
        r" 1 \& 2 \# \$3 \{4\} \textasciitilde{}5 \textasciicircum{}6 \textbackslash{}7 \textless{} "
        r"\textbar{}8\textbar{}\par}"
    )
    assert escape_latex("t_1") == r"t\_1"
    assert r"\label{tab:t_1}" in lines
    text = "\n".join(lines)
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    assert columns == "lccrrr"
    assert {line.count("&") for line in lines if line.endswith(r"0.0} \\")} == {len(columns) - 1}


# Significance


def paired(differences_by_fold, other=20.0):
    """Results of Ours and Other whose differences in maF1, miF1 and UA are given, fold by fold."""
    frames = []
    for fold, differences in enumerate(differences_by_fold, start=1):
        differences = np.asarray(differences, dtype=float).reshape(len(differences), -1)
        frames.append(results("Other", [other] * len(differences), fold=fold))
        frames.append(results("Ours", [other] * len(differences), fold=fold))
        frames[-1][METRICS] += differences
    return pd.concat(frames, ignore_index=True)


def test_wilcoxon_and_holm_by_hand():
    # Ranks 1 to 6. Of the 64 equally likely sign patterns, rank sums as small as all-positive's: 1, twice for the two
    # sides; as small as with rank 1 negative: 2, twice. Holm over three: 3 x 2/64, 2 x 4/64, 1.
    up, one_down, nothing = [1, 2, 3, 4, 5, 6], [-1, 2, 3, 4, 5, 6], [0] * 6
    by_episode = np.array([up, one_down, nothing]).T
    frame = significance.compare(paired([by_episode[:3], by_episode[3:]]), "Ours", ["Other"])
    assert frame["metric"].tolist() == METRICS
    assert frame["difference"].tolist() == pytest.approx([21 / 6, 19 / 6, 0])
    assert frame["p"].tolist() == pytest.approx([2 / 64, 4 / 64, 1])
    assert frame["p_corrected"].tolist() == pytest.approx([6 / 64, 8 / 64, 1])
    assert frame[["episodes", "folds"]].to_numpy().tolist() == [[6, 2]] * 3
    assert not frame["significant"].any(), "the interval of maF1, [2, 5], is above 0, but its corrected p is not small"
    assert frame.loc[0, ["low", "high"]].tolist() == [2, 5]


def test_a_small_p_with_an_interval_around_0_is_not_significant():
    folds = [[1.0] * 12 + [0.5] * 12, [1.5] * 12, [-0.1] * 4]
    frame = significance.compare(paired([np.repeat(np.c_[fold], 3, axis=1) for fold in folds]), "Ours", ["Other"])
    assert (frame["p_corrected"] < 0.001).all()
    assert (frame["low"] < 0).all()
    assert not frame["significant"].any()


def test_the_interval_is_that_of_all_ways_to_draw_folds():
    values = {1: [0.0], 2: [1.0, 2.0], 3: [4.0, 5.0, 9.0], 4: [8.0, 8.5, 9.5, 16.0]}
    draws = sorted(
        np.mean([value for fold in drawn for value in values[fold]]) for drawn in itertools.product(values, repeat=4)
    )
    # 2.5% and 97.5% of 256 equally likely draws: 6.4 of them lie below, 6.4 above.
    flat = np.array([value for fold in values.values() for value in fold])
    folds = np.array([fold for fold, own in values.items() for _ in own])
    low, high = significance.clustered_interval(flat[:, None], folds, seed=3)
    assert [low.item(), high.item()] == pytest.approx([draws[6], draws[-7]])


def test_the_interval_does_not_shrink_with_more_of_the_same_from_each_fold():
    once = significance.clustered_interval(np.array([[0.0], [10.0]]), np.array([1, 2]))
    often = significance.clustered_interval(np.repeat([[0.0], [10.0]], 50, axis=0), np.repeat([1, 2], 50))
    assert [side.item() for side in often] == [side.item() for side in once] == [0, 10]


def test_a_comparison_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    rows = paired([rng.normal(1, 1, (5, 3)).round(4) for _ in range(4)])
    shuffled = rows.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(
        significance.compare(rows, "Ours", ["Other"]), significance.compare(shuffled, "Ours", ["Other"])
    )


def test_a_single_fold_has_no_interval_and_says_so(tmp_path):
    frame = significance.compare(paired([np.full((40, 3), 5.0)]), "Ours", ["Other"])
    assert frame[["low", "high"]].isna().all().all()
    assert (frame["p_corrected"] < 0.001).all()
    assert not frame["significant"].any()
    significance.write_comparison(frame, tmp_path, "c")
    text = (tmp_path / "c.md").read_text()
    assert "single fold" in text
    assert "Ours is not significantly apart from Other in maF1 (+5.0 points)" in text


def test_rows_without_a_partner_or_with_two_are_named():
    rows = paired([np.ones((2, 3)), np.ones((2, 3))])
    alone = rows.drop(index=rows.index[(rows["system"] == "Other") & (rows["fold"] == 2) & (rows["episode"] == 1)])
    with pytest.raises(
        MetaPerSERError, match="Other, seen: no result of fold 2, test annotator E2, episode 1, shots 4"
    ):
        significance.compare(alone, "Ours", ["Other"])
    with pytest.raises(MetaPerSERError, match=r"Ours, seen: several results of fold 1.*one upstream"):
        significance.compare(pd.concat([rows, rows.assign(upstream="wavlm_base")]), "Ours", ["Other"])
    common = significance.compare(alone, "Ours", ["Other", "Absent"], common_only=True)
    assert common[["other", "episodes", "folds"]].to_numpy().tolist() == [["Other", 3, 2]] * 3


def test_a_comparison_says_in_words_what_it_found(tmp_path):
    by_episode = np.array([[6.0, -3.0, 0.0], [6.5, -3.5, 0.0]] * 10)
    rows = paired([by_episode, by_episode + np.array([1, -1, 0])])
    weak = rows[rows["system"] == "Other"].assign(system="Weak")
    weak[METRICS] -= 15
    frame = significance.compare(pd.concat([rows, weak]), "Ours", ["Weak", "Other"])
    (sentence,) = significance.sentences(frame)
    assert sentence == (
        "seen: Ours is above Other by 6.8 points maF1 [6.2, 7.2]; below Other by 3.8 points miF1 [−4.2, −3.2]; "
        "not significantly apart from Other in UA (+0.0 points [0.0, 0.0]). Each against the strongest other system."
    )
    significance.write_comparison(frame, tmp_path, "c")
    lines = grid((tmp_path / "c.md").read_text())
    assert lines[3] == [
        *("Other", "40", "2", "**+6.8 [6.2, 7.2]**", r"\< 0.001"),
        *("**−3.8 [−4.2, −3.2]**", r"\< 0.001", "+0.0 [0.0, 0.0]", "1.000"),
    ]
    assert pd.read_csv(tmp_path / "c.csv").columns.tolist() == significance.COLUMNS


# Figures


def test_the_figure_of_shots_shows_means_bands_and_exactly_the_shots_there_are():
    rows = [results("A", [fold + k, fold + k + 2.0], fold=fold, shots=k) for k in (2, 8, 64) for fold in (1, 2, 3)]
    rows += [results("All labels", [90.0], fold=fold, shots=k) for k in (2, 8, 64) for fold in (1, 2, 3)]
    figure = figures.shots_figure(pd.concat(rows), "title", ["All labels"])
    assert len(figure.axes) == 3
    for axes, above in zip(figure.axes, (0, 10, 50), strict=True):
        assert axes.get_xticks().tolist() == [2, 8, 64]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "8", "64"]
        assert "(%)" in axes.get_ylabel()
        line, reference = axes.get_lines()
        assert line.get_ydata().tolist() == [above + 3 + k for k in (2, 8, 64)]
        assert (reference.get_linestyle(), reference.get_label()) == ("--", "All labels")
        # Fold means are 1, 2, 3 above K plus 1; with three folds the extreme draws have 1/27 each.
        corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
        assert {(8, above + 8 + 2), (8, above + 8 + 4)} <= corners


def test_systems_have_markers_and_colours_of_their_own():
    figure = figures.shots_figure(pd.concat([results(f"S{n}", [float(n)]) for n in range(7)]), "one fold")
    lines = figure.axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 7


def test_a_figure_is_written_as_the_same_bytes_each_time(tmp_path):
    rows = pd.concat([results("A", [10.0, 14.0]), results("B", [9.0], "unseen"), results("All labels", [90.0])])
    written = []
    for folder in ("one", "two"):
        figure = figures.systems_figure(tables.summarise(rows), "title", ["All labels"])
        write_figure(figure, tmp_path / folder, "t")
        written.append([(tmp_path / folder / f"t.{ending}").read_bytes() for ending in ("png", "svg")])
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG")
    assert b"<svg" in written[0][1]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["A", "B", "All labels"]


# The report


class Reader(HTMLParser):
    """Collects the tags of a page with their attributes and text, and checks that they are closed in order."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in self.VOID:
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for element in self.open:
            element[2] += text

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


@pytest.fixture
def page(tmp_path):
    rows = [
        results(system, [v + fold, v + 1.0], fold=fold)
        for system, v in (("Ours", 30.0), ("Other", 10.0))
        for fold in (1, 2, 3)
    ]
    everything = pd.concat([*rows, *(results("All labels", [90.0, 90.0], fold=fold) for fold in (1, 2, 3))])
    table = tables.write_tables(everything, tmp_path, "table1", reference=["All labels"])
    comparison = significance.compare(everything, "Ours", ["Other"])
    write_figure(figures.systems_figure(tables.summarise(everything), "title"), tmp_path, "table1")
    chosen = pd.DataFrame({"scenario": ["seen"], "fold": [1], "system": ["Ours"], "setting": ["inner_lr 0.1"]})
    contents = report.Report(
        title="Table 1",
        corpus='<script>alert("x")</script> & "co"',
        sections=[
            report.Section("Systems", "One.\nTwo.", table, tmp_path / "table1.svg", tmp_path / "table1.csv", "Means"),
            report.Section("Differences", table=significance.write_comparison(comparison, tmp_path, "comparison")),
            report.Section("A frame", table=chosen, figure=tmp_path / "table1.png"),
        ],
        commands=["metaperser experiment table1 --set 'a=<b>'"],
        versions=report.versions(),
        settings={"runner": {"total_steps": 6000}},
        seeds={"runs": 1337},
        chosen=chosen,
        failures=["multi_few in fold2 ended with code 1"],
        runs=pd.DataFrame({"run": ["seen/fold1/ssl_e"], "seconds": [41.234], "state": ["done"]}),
    )
    return Reader(report.write_report(tmp_path, contents).read_text(encoding="utf-8")), tmp_path


def test_the_report_loads_nothing_from_elsewhere(page):
    reader, out = page
    images = [attributes["src"] for attributes, _ in reader.all("img")]
    assert [image.split(";")[0] for image in images] == ["data:image/svg+xml", "data:image/png"]
    assert base64.b64decode(images[0].split(",")[1]) == (out / "table1.svg").read_bytes()
    links = [attributes["href"] for attributes, _ in reader.all("a")]
    anchors = {attributes["id"] for _, attributes, _ in reader.found if "id" in attributes}
    for link in links:
        assert link.startswith("data:text/csv;base64,") or link.removeprefix("#") in anchors
    assert not reader.all("script") + reader.all("link")
    ((_, style),) = reader.all("style")
    assert not re.search(r"url\(|@import", style)
    loading = {"src", "href", "srcset", "data", "poster", "action", "background"}
    assert {name for _, attributes, _ in reader.found for name in attributes} & loading == {"src", "href"}


def test_the_report_is_escaped_and_says_everything(page):
    reader, _ = page
    ((_, corpus),) = [found for found in reader.all("p") if found[0].get("class") == "corpus"]
    assert corpus == 'Corpus: <script>alert("x")</script> & "co"'
    ((_, commands),) = reader.all("pre")
    assert commands == "metaperser experiment table1 --set 'a=<b>'"
    text = reader.all("body")[0][1]
    assert "1 run failed" in text
    for said in (
        "multi_few in fold2",
        "Ours is not significantly apart from Other",
        "inner_lr 0.1",
        "runner.total_steps",
        "1337",
        "41.23",
    ):
        assert said in text
    versions = report.versions()
    assert {"Python", "s3prl-metaperser", "s3prl", "torch", "torchaudio", "higher", "numpy"} <= set(versions)
    assert versions["torch"] in text
    assert text.index("multi_few in fold2") < text.index("One.")


def test_the_report_can_be_read_by_those_who_do_not_see_it(page):
    reader, _ = page
    assert reader.all("html")[0][0]["lang"] == "en"
    assert [attributes["alt"] for attributes, _ in reader.all("img")] == ["Means", "A frame"]
    assert all("scope" in attributes for attributes, _ in reader.all("th"))
    assert len(reader.all("h1")) == 1
    reference = [text for attributes, text in reader.all("tr") if attributes.get("class") == "reference"]
    assert len(reference) == 1
    bold = [text for _, text in reader.all("strong")]
    assert "31.5 ± 0.8" in bold
    assert not any(text.startswith("90.0") for text in bold)


def test_a_figure_that_is_not_there_is_named_and_no_report_is_written(tmp_path):
    contents = report.Report("T", "C", [report.Section("S", figure=tmp_path / "no.svg")], [], {}, {}, {})
    with pytest.raises(MetaPerSERError, match=r"no\.svg, to be shown in a report, cannot be read"):
        report.write_report(tmp_path, contents)
    assert not (tmp_path / "report.html").exists()
