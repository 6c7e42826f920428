"""The page about a run or a search: one file, everything in it, nothing from the web."""

import json
import re

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import layerwise
from layerwise.choosing.search import search
from layerwise.errors import DataError, RunError
from layerwise.report.page import write_report


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator)
    return TensorDataset(x[:32], (x[:32, 0] > 0).long()), TensorDataset(x[32:], (x[32:, 0] > 0).long())


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    model, out = make_model(), tmp_path_factory.mktemp("runs") / "a"
    layers = layerwise.layer_map(model, data[0][0][0][None])
    about = {"advice": {"strategy": "x<y", "confidence": "low", "reasons": [
        {"about": "size", "confidence": "high", "text": "32 samples & more"}]}}  # fmt: skip
    plan = layerwise.gradual_unfreezing(layers, epochs=4)
    layerwise.fit(
        model, *data, plan=plan, out=out, layers=layers, about=about, progress=False, classes=["no", "yes"]
    )
    return out


def test_page_of_a_run_holds_everything_and_needs_nothing(run):
    # metrics, rates, curves, tables, audit, advice (escaped), settings and plan; no link to the web
    page = write_report(run).read_text()
    result = json.loads((run / "run.json").read_text())["result"]
    for heading in (
        "Summary",
        "Why this plan",
        "Learning curves",
        "Per class",
        "Confusion",
        "Audit",
        "Settings",
    ):
        assert f"<h2>{heading}" in page
    assert f"{result['metrics']['balanced_accuracy']:.4f}" in page
    assert page.count("<svg") == 2
    assert "x&lt;y" in page
    assert "32 samples &amp; more" in page
    assert "gradual_unfreezing" in page
    assert not re.findall(r'(?:src|href)="http', page)


def test_a_page_is_not_written_into_a_folder_that_is_not_there(run, tmp_path):
    with pytest.raises(DataError, match=r"a report cannot be written .* there is no folder '[^']*nope'"):
        write_report(run, tmp_path / "nope" / "x.html")


def test_wide_tables_scroll_in_a_box(run):
    # a confusion table of many classes does not widen the page
    page = write_report(run).read_text()
    assert ".wide { overflow-x: auto" in page
    assert page.count("<div class=wide><table>") == page.count("<table>") > 3


def test_page_of_an_unfinished_run_says_so(run, tmp_path):
    # a run that was cut off has no result yet; the page still shows what there is
    import shutil

    shutil.copytree(run, tmp_path / "cut")
    about = json.loads((tmp_path / "cut" / "run.json").read_text())
    del about["result"]
    (tmp_path / "cut" / "run.json").write_text(json.dumps(about))
    page = write_report(tmp_path / "cut", tmp_path / "page.html").read_text()
    assert "not finished" in page
    assert "Learning curves" in page


def test_page_of_a_run_that_was_cut_off_in_its_first_epoch(run, tmp_path):
    # no history, audit or plan file yet: no pictures, and no empty headings
    import shutil

    shutil.copytree(run, tmp_path / "cut")
    about = json.loads((tmp_path / "cut" / "run.json").read_text())
    del about["result"], about["advice"]
    (tmp_path / "cut" / "run.json").write_text(json.dumps(about))
    for name in ("history.jsonl", "audit.json", "plan.yaml"):
        (tmp_path / "cut" / name).unlink()
    page = write_report(tmp_path / "cut").read_text()
    assert "not finished" in page
    assert re.findall("<h2>(.*)</h2>", page) == ["Summary", "Settings"]
    assert "<svg" not in page


def test_the_advice_has_its_sentence(run, tmp_path):
    # without the sentence the reasons below may seem to speak for another plan
    about = json.loads((run / "run.json").read_text())
    about["advice"]["why"] = "few samples & unlike: only the last groups"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    page = write_report(tmp_path / "run").read_text()
    assert "<p>Advice: x&lt;y (low confidence): few samples &amp; unlike: only the last groups</p>" in page


def test_why_a_plan_was_chosen_is_told_beside_the_advice(run, tmp_path):
    # what --strategy auto said of the search
    import shutil

    shutil.copytree(run, tmp_path / "r")
    about = json.loads((tmp_path / "r" / "run.json").read_text())
    about["choice"] = "the search gains +5% & more"
    (tmp_path / "r" / "run.json").write_text(json.dumps(about))
    assert "<p>the search gains +5% &amp; more</p>" in write_report(tmp_path / "r").read_text()


def test_letters_of_settings_are_readable(run, tmp_path):
    # no \\u escapes for names that are not ASCII
    import shutil

    shutil.copytree(run, tmp_path / "r")
    about = json.loads((tmp_path / "r" / "run.json").read_text())
    about["data"]["source"] = "Übung"
    (tmp_path / "r" / "run.json").write_text(json.dumps(about))
    assert "Übung" in write_report(tmp_path / "r").read_text(encoding="utf-8")


def test_trained_parameters_read_as_all_only_where_they_are(run, tmp_path):
    # the share of all but one
    import shutil

    shutil.copytree(run, tmp_path / "r")
    about = json.loads((tmp_path / "r" / "run.json").read_text())
    about["result"] |= {"trained_parameters": 20_000, "total_parameters": 20_001}
    (tmp_path / "r" / "run.json").write_text(json.dumps(about))
    assert "20,000 (&gt;99.9%)" in write_report(tmp_path / "r").read_text()


def test_findings_of_the_audit_are_told(run, tmp_path):
    # severity, module, reason and remedy of each; what a later phase warned of
    import shutil

    shutil.copytree(run, tmp_path / "found")
    finding = {"severity": "warning", "code": "c", "modules": ["bn1"], "why": "it drifts", "fix": "freeze it"}
    (tmp_path / "found" / "audit.json").write_text(
        json.dumps({"before": {"findings": [finding]}, "phases": {"from 3": "<4 samples"}, "after": None})
    )
    page = write_report(tmp_path / "found").read_text()
    assert all(f"{text}</td>" in page for text in ("warning", "bn1", "it drifts", "freeze it"))
    assert "<p>As phase &#x27;from 3&#x27; began: &lt;4 samples</p>" in page


def test_page_of_a_search_lists_every_trial(data, tmp_path):
    # the curve's picture and one row a trial
    search(make_model(), *data, test=data[1], trials=3, epochs=1, out=tmp_path / "s")
    page = write_report(tmp_path / "s").read_text()
    assert page.count("<svg") == 1
    assert "test balanced_accuracy" in page
    assert page.count("<td class=words>complete</td>") + page.count("<td class=words>pruned</td>") == 3
    # a linear probe has no decay, neither as a point of the curve nor as a trial
    rows = [row for row in page.split("<tr>") if ">last 1</td>" in row]
    assert len(rows) == 2
    assert all("<td>-</td>" in row for row in rows)
    assert any("<td>0.90</td>" in row for row in page.split("<tr>") if ">last 2</td>" in row)


def test_page_of_a_search_of_named_strategies_has_no_curve(data, tmp_path):
    # they have no depth; notes are told
    search(
        make_model(), *data, trials=1, epochs=1, depths=(), strategies=["full"], out=tmp_path / "s",
        refit="none",
    )  # fmt: skip
    summary = tmp_path / "s" / "search.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "notes": ["1 trial & more"]}))
    page = write_report(tmp_path / "s").read_text()
    assert "<svg" not in page
    assert "<td class=words>full</td>" in page
    assert "<p class=note>1 trial &amp; more</p>" in page


def test_page_of_a_run_without_metrics_has_no_tables_of_them(run, tmp_path):
    # nothing to validate on: the summary says what there is, and no heading stands above nothing
    import shutil

    shutil.copytree(run, tmp_path / "bare")
    about = json.loads((run / "run.json").read_text())
    about["result"] |= {"metrics": {}, "tables": {}, "test": None, "test_tables": None}
    (tmp_path / "bare" / "run.json").write_text(json.dumps(about))
    (tmp_path / "bare" / "history.jsonl").write_text("")
    page = write_report(tmp_path / "bare").read_text()
    headings = re.findall("<h2>(.*)</h2>", page)
    assert headings == ["Summary", "Why this plan", "Audit", "Settings", "Plan file"]
    kept = f"{about['result']['best_epoch'] + 1} of 4 ({about['result']['stopped']})"
    assert f"<td class=words>{kept}</td>" in page
    assert "validation " not in page


def test_a_metric_that_is_no_number_is_a_dash(run, tmp_path):
    # null in the file
    import shutil

    shutil.copytree(run, tmp_path / "blind")
    about = json.loads((run / "run.json").read_text())
    about["result"] |= {"metrics": {"loss": None}, "test": {"loss": None}}
    (tmp_path / "blind" / "run.json").write_text(json.dumps(about))
    page = write_report(tmp_path / "blind").read_text()
    for part in ("validation", "test"):
        assert f"<tr><td>{part} loss</td><td class=words>-</td></tr>" in page


def test_a_wrong_path_is_told_with_what_is_there(run, tmp_path):
    # a folder of something else, a file, nothing; runs beside it are named
    beside = f"Runs in {run.parent}: a."
    for path, told in (
        (
            tmp_path,
            f"{tmp_path} holds neither a run (run.json) nor a search (search.json). Give the folder that "
            "layerwise fit --out or layerwise search --out wrote.",
        ),
        (
            run / "run.json",
            f"{run / 'run.json'} is a file. Give the folder of a run or a search.",
        ),
        (
            run.parent,
            f"{run.parent} holds neither a run (run.json) nor a search (search.json). {beside} Give the "
            "folder that layerwise fit --out or layerwise search --out wrote.",
        ),
        (
            run.parent / "b",
            f"{run.parent / 'b'} does not exist. {beside} Give the folder of a run or a search.",
        ),
        (
            tmp_path / "b",
            f"{tmp_path / 'b'} does not exist. Give the folder of a run or a search.",
        ),
    ):
        with pytest.raises(RunError) as caught:
            write_report(path)
        assert str(caught.value) == told


ALTERED = json.dumps({"best": None, "metric": "a", "run": None, "curve": [], "trials": [], "notes": []})


@pytest.mark.parametrize("content", ["[]", "{}", '{"best": {}, "metric": "accuracy"}', ALTERED])
def test_a_search_that_was_altered_is_told(tmp_path, content):
    # JSON, and yet no search
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(RunError, match=r"search\.json is not the record of a search, so it was altered"):
        write_report(tmp_path)


@pytest.mark.parametrize("line", ["3", "[1]", '{"epoch": NaN}', '{"step": 3, "phase": "head", "rates": {}}'])
def test_a_history_that_was_altered_is_told(run, tmp_path, line):
    # JSON, and yet no epoch
    import shutil

    shutil.copytree(run, tmp_path / "r")
    with (tmp_path / "r" / "history.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=r"history\.jsonl is not the history of a run, so it was altered"):
        write_report(tmp_path / "r")


@pytest.mark.parametrize("name", ["search.json", "history.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_told(run, tmp_path, name):
    # by its name
    if name == "history.jsonl":
        (tmp_path / "run.json").write_text((run / "run.json").read_text())
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=rf"{name} cannot be read: .*Is a directory"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["search.json", "audit.json", "history.jsonl"])
def test_a_damaged_file_is_told(run, tmp_path, name):
    # which one it is, and why, without a traceback
    import shutil

    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / name).write_text('{"cut')
    if name == "search.json":
        (tmp_path / "r" / "run.json").unlink()
    with pytest.raises(RunError, match=rf"{name} cannot be read: Unterminated string"):
        write_report(tmp_path / "r")


def test_a_plan_file_that_is_no_text_in_utf_8_is_told(run, tmp_path):
    # saved by an editor in an encoding of its own
    import shutil

    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "plan.yaml").write_text("phases: []", encoding="utf-16")
    with pytest.raises(RunError, match=r"plan\.yaml cannot be read: 'utf-8' codec"):
        write_report(tmp_path / "r")
