"""`write_report`: one HTML page about a run or a search, pictures inside, nothing fetched from the web."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.choosing.search_result import CurvePoint
from layerwise.errors import RunError, figure, percent, plural
from layerwise.files import write_text
from layerwise.report import pictures
from layerwise.training.history import read_history
from layerwise.training.run_folder import read_run, runs_beside, runs_in

Section = tuple[str, str]
"""A heading and its HTML."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse }
td, th { padding: .15rem .8rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff }
td:first-child { white-space: nowrap } th { border-bottom: 1px solid #999; font-weight: 600 }
td.words, th.words { text-align: left }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px }
svg { max-width: 100%; height: auto } .note { color: #666 }
"""


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write a page about the run or the search in the folder `path`; return where it is.

    A run's page shows what learned when and at which rates, the learning curves, the tables of its
    metrics, why the plan was chosen (for ``--strategy auto``), what the audit found, and all settings. A
    search's page shows the curve of the metric against depth and every trial. The page is one file.

    Args:
        path: folder of a run (``run.json``) or of a search (``search.json``).
        out: file to write; None is ``report.html`` in the folder.

    Raises:
        RunError: there is neither a run nor a search, or a file of it cannot be read.
        DataError: the folder of `out` is not there.
        MissingExtraError: Altair or vl-convert is not installed.
    """
    folder = Path(path)
    target = folder / "report.html" if out is None else Path(out)
    if out is not None:
        pictures.require_folder_of(target, "a report")
    if (folder / "run.json").exists():
        title, sections = _run(folder)
    elif (folder / "search.json").exists():
        title, sections = _search(folder)
    elif not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {there}.{runs_beside(folder)} Give the folder of a run or a search.")
    else:
        raise RunError(
            f"{folder} holds neither a run (run.json) nor a search (search.json).{runs_in(folder)} Give the "
            "folder that layerwise fit --out or layerwise search --out wrote."
        )
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )
    write_text(target, page)
    return target


def _run(folder: Path) -> tuple[str, list[Section]]:
    about = read_run(folder)
    lines = folder / "history.jsonl"
    history = _read(lines, read_history) if lines.exists() else []
    if not all(
        isinstance(entry, dict) and {"epoch", "phase", "step", "rates"} <= {*entry} for entry in history
    ):
        raise RunError(f"{lines} is not the history of a run, so it was altered; put the old one back.")
    result = about.get("result") or {}
    plan = about["plan"]
    sections: list[Section] = []
    summary = [["model", about["model"].get("spec") or about["model"]["class"]], ["plan", plan["strategy"]]]
    summary += [[f"validation {name}", _number(value)] for name, value in result.get("metrics", {}).items()]
    summary += [[f"test {name}", _number(value)] for name, value in (result.get("test") or {}).items()]
    if result:
        share = percent(result["trained_parameters"], result["total_parameters"])
        summary += [
            ["kept epoch", f"{result['best_epoch'] + 1} of {result['epochs']} ({result['stopped']})"],
            ["trained parameters", f"{result['trained_parameters']:,} ({share}%)"],
            ["steps", f"{result['steps']:,}"],
            ["seconds", f"{result['seconds']:.1f}"],
        ]
    else:
        summary.append(["state", "not finished: layerwise fit --resume goes on with it"])
    sections.append(("Summary", _table(["", ""], summary, words=(1,))))
    if advice := about.get("advice"):
        reasons = [[r["about"], r["confidence"], r["text"]] for r in advice["reasons"]]
        said = f"{advice.get('described', advice['strategy'])} ({advice['confidence']} confidence)"
        said += f": {advice['why']}" if "why" in advice else ""
        text = f"<p>Advice: {html.escape(said)}</p>"
        if chosen := about.get("choice"):
            text += f"<p>{html.escape(chosen)}</p>"
        sections.append(
            ("Why this plan", text + _table(["", "confidence", "finding"], reasons, words=(1, 2)))
        )
    if history:
        heat = _svg(pictures.plan_picture(_rates(plan, history, about["settings"]["lr"])))
        sections.append(("Who learned when, at which rate (at the end of each epoch)", heat))
        sections.append(("Learning curves", _svg(pictures.history_picture(history))))
    tables = result.get("test_tables") or result.get("tables") or {}
    if rows := tables.get("per_class"):
        columns = list(rows[0])
        cells = [[_number(row[key]) for key in columns] for row in rows]
        where = "test" if result.get("test_tables") else "validation"
        sections.append((f"Per class ({where})", _table(columns, cells)))
    if confusion := tables.get("confusion"):
        classes = about["task"]["classes"]
        cells = [[name, *map(str, row)] for name, row in zip(classes, confusion)]
        sections.append(("Confusion (rows: true class, columns: predicted)", _table(["", *classes], cells)))
    if (folder / "audit.json").exists():
        sections.append(("Audit", _audit(_read(folder / "audit.json"))))
    known = {key: about[key] for key in ("settings", "data", "versions", "git", "created") if key in about}
    sections.append(
        ("Settings", f"<pre>{html.escape(json.dumps(known, indent=1, ensure_ascii=False))}</pre>")
    )
    if (folder / "plan.yaml").exists():
        text = html.escape(_read(folder / "plan.yaml", _read_text))
        sections.append(("Plan file", f"<pre>{text}</pre>"))
    return f"Run {folder.name}", sections


def _search(folder: Path) -> tuple[str, list[Section]]:
    found = _read(folder / "search.json")
    if (
        not isinstance(found, dict)
        or not {"best", "metric", "run", "curve", "trials", "notes"} <= set(found)
        or not isinstance(found["best"], dict)
        or not {point.name for point in dataclasses.fields(CurvePoint)} <= set(found["best"])
    ):
        raise RunError(
            f"{folder / 'search.json'} is not the record of a search, so it was altered; put the old one "
            "back."
        )
    best, metric = found["best"], found["metric"]
    summary = [
        [
            "best",
            best["choice"] if best["trained_groups"] is None else f"{best['choice']} (from {best['first']})",
        ],
        [metric, _with_error(best) + (f" ({best['seeds']} seeds)" if best["seeds"] > 1 else "")],
        ["learning rate", f"{best['lr']:.3g}"],
        ["decay", _decay(best)],
        ["run", (found["run"] or {}).get("out") or "-"],
    ]
    tested = (found["run"] or {}).get("test") or {}
    summary += [[f"test {name}", _number(value)] for name, value in tested.items()]
    sections = [("Summary", _table(["", ""], summary, words=(1,)))]
    if any(point["trained_groups"] is not None for point in found["curve"]):
        picture = _svg(pictures.depth_picture(found["curve"], metric=metric))
        sections.append(("Accuracy by depth" if "accuracy" in metric else f"{metric} by depth", picture))
    columns = ["trained", "from", metric, "seeds", "lr", "decay"]
    rows = [
        [
            p["choice"],
            "-" if p["trained_groups"] is None else p["first"],
            _with_error(p),
            str(p["seeds"]),
            f"{p['lr']:.3g}",
            _decay(p),
        ]
        for p in found["curve"]
    ]
    sections.append(("Best setting of each choice", _table(columns, rows, words=(1,))))
    groups = {p["choice"]: p["trained_groups"] for p in found["curve"]}
    columns = ["trial", "trained", "lr", "decay", "seed", metric, "epochs", "seconds", "state"]
    rows = [
        [
            str(t["number"]), t["choice"], f"{t['lr']:.3g}",
            _decay({**t, "trained_groups": groups.get(t["choice"], 0)}), str(t["seed"]),
            "-" if t["value"] is None else figure(t["value"]), str(t["epochs"]),
            "-" if t["seconds"] is None else f"{t['seconds']:.1f}",
            t["state"] + (f": {t['error']}" if t["error"] else ""),
        ]
        for t in found["trials"]
    ]  # fmt: skip
    sections.append(("Trials", _table(columns, rows, words=(1, 8))))
    if found["notes"]:
        sections.append(
            ("Notes", "".join(f"<p class=note>{html.escape(note)}</p>" for note in found["notes"]))
        )
    return f"Search {folder.name}", sections


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _read_json(file: Path) -> Any:
    return json.loads(_read_text(file))


def _read(file: Path, read: Callable[[Path], Any] = _read_json) -> Any:
    try:
        return read(file)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{file} cannot be read: {error}. It was altered or cut short; put the old one back."
        ) from error


def _rates(plan: Mapping[str, Any], history: Sequence[Mapping[str, Any]], lr: float) -> dict[str, Any]:
    """Return the rates that the history tells in the form of a plan's explanation."""
    starts = [0, *(entry["step"] for entry in history)]
    phases: list[dict[str, Any]] = []
    for start, entry in zip(starts, history):
        if not phases or phases[-1]["name"] != entry["phase"]:
            phases.append({"name": entry["phase"], "first_step": start})
    return {
        "strategy": plan["strategy"],
        "lr": lr,
        "steps": history[-1]["step"],
        "heat_edges": starts,
        "groups": plan["groups"],
        "heat": [[entry["rates"].get(name, 0.0) for entry in history] for name in plan["groups"]],
        "phases": phases,
    }


def _audit(audit: Mapping[str, Any]) -> str:
    before, after = audit.get("before"), audit.get("after")
    parts = []
    findings = (before or {}).get("findings", [])
    if findings:
        rows = [[f["severity"], ", ".join(f["modules"][:4]), f["why"], f["fix"]] for f in findings]
        parts.append(_table(["severity", "where", "why", "what to do"], rows, words=(1, 2, 3)))
    elif before is not None:
        parts.append("<p>Before training: no findings.</p>")
    for phase, told in audit.get("phases", {}).items():
        parts.append(f"<p>{html.escape(f'As phase {phase!r} began: {told}')}</p>")
    if after is not None:
        moved = len(after.get("moved", []))
        state = "nothing frozen moved" if after.get("ok") else "something frozen moved"
        parts.append(f"<p>After training: {state}; {plural(moved, 'tensor')} changed.</p>")
    return "".join(parts) or "<p>Not run.</p>"


def _svg(chart: Any) -> str:
    return f"<figure>{pictures.as_svg(chart)}</figure>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    head = "".join(
        f"<th{' class=words' if i in words else ''}>{html.escape(column)}</th>"
        for i, column in enumerate(columns)
    )
    lines = []
    for row in rows:
        cells = (
            f"<td{' class=words' if i in words else ''}>{html.escape(str(cell))}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table>{f'<tr>{head}</tr>' if any(columns) else ''}{''.join(lines)}</table>"
    return f"<div class=wide>{table}</div>"  # many classes make many columns


def _decay(point: Mapping[str, Any]) -> str:
    """Return the decay of a point, a dash where the plan has none: a probe, a named strategy."""
    return "-" if point["trained_groups"] in (None, 1) else f"{point['decay']:.2f}"


def _with_error(point: Mapping[str, Any]) -> str:
    error = f" ± {figure(point['error'])}" if point["seeds"] > 1 else ""
    return f"{figure(point['mean'])}{error}"


def _number(value: Any) -> str:
    return "-" if value is None else figure(value) if isinstance(value, float) else str(value)
