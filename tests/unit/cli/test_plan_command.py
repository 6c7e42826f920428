"""`layerwise plan`: make, check, show and write plans."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from image_folders import make_images
from layerwise.cli.main import app
from layerwise.plans.plan import Plan
from layerwise.training.job import Job, open_job
from versions import is_told

MODEL = "timm:test_vit"


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_plan_is_shown_and_written_and_read_back(tmp_path: Path):
    # What -o writes is the plan that was shown; --plan shows it again.
    out = tmp_path / "plan.yaml"
    made = command(MODEL, "--strategy", "discriminative:decay=0.5,frozen=1", "--epochs", 3, "-o", out)
    assert made.exit_code == 0, made.output
    assert "discriminative(decay=0.5, frozen=1): 1 phase, 3 epochs" in made.stdout
    assert f"layerwise fit --plan {out} --model ..." in made.stdout
    plan = Plan.load(out)
    assert plan.phases[0].epochs == 3
    shown = command(MODEL, "--plan", out, "--lr", 0.01, "--steps-per-epoch", 7)
    assert shown.exit_code == 0, shown.output
    assert "base rate 0.01; 7 steps an epoch" in shown.stdout
    assert plan.groups[1] in shown.stdout


def test_the_way_to_run_a_plan_names_the_rate_that_was_shown(tmp_path: Path):
    # A plan holds multiples; without --lr the run would learn at fit's own rate.
    out = tmp_path / "plan.yaml"
    made = command(MODEL, "--strategy", "linear_probe", "--lr", 0.03, "-o", out)
    assert "base rate 0.03" in made.stdout
    assert f"layerwise fit --plan {out} --lr 0.03 --model ..." in made.stdout


def test_json_holds_the_plan_and_the_timeline():
    # The JSON rebuilds the plan, and has the rates that the table shows.
    result = command(MODEL, "--strategy", "linear_probe", "--json")
    data = json.loads(result.stdout)
    plan = Plan(**data["plan"])
    (phase,) = data["timeline"]["phases"]
    assert [group["name"] for group in phase["groups"]] == [plan.groups[-1]]
    assert phase["trainable"] < data["timeline"]["total"]


def test_constants_that_the_model_freezes_are_not_counted(tmp_path: Path):
    # Position tables and the like: no plan trains them, and the count is that of the Tuner's own.
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "        self.body = nn.Linear(4, 4)\n"
        "        self.body.table = nn.Parameter(torch.ones(1000, 4), requires_grad=False)\n"
        "        self.head = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(self.stem(x)) * self.body.table.mean(0))\n"
        "def build():\n"
        "    return Own()\n"
    )
    spec, images = f"{file}:build", make_images(tmp_path / "images")
    phases = json.loads(command(spec, "--strategy", "full", "--json").stdout)["timeline"]["phases"]
    assert [phase["trainable"] for phase in phases] == [(3 * 64 + 1) * 4 + 5 * 4 + 5 * 2]
    found = open_job(Job(spec, str(images), strategy="full", granularity="layers")).dry_run()
    assert [p.trainable for p in found.explanation.phases] == [cost.trainable for cost in found.costs]


def test_the_rate_table_is_the_one_in_the_docs():
    # The docs' table for L = 12 is what the command prints.
    result = command("--rate-table", "--json")
    rates = json.loads(result.stdout)["rates"]
    page = (Path(__file__).parents[3] / "docs/methods/discriminative.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert [int(layer) for layer, _ in rows] == [12, 9, 6, 3, 1]
    for layer, cells in rows:
        assert cells.split(" | ") == [f"{rates[alpha][layer]:.2e}" for alpha in ("0.95", "0.9", "0.8", "0.7")]
    assert "3.00e-05" in command("--rate-table", "--layers", 3, "--decay", "0.5").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([MODEL], 2, "exactly one of --strategy and --plan"),
        (["--strategy", "full"], 2, "MODEL is missing"),
        ([MODEL, "--strategy", "topk:2"], 1, "Did you mean 'top_k'"),
        ([MODEL, "--strategy", "top_k:99"], 1, "k is a whole number from 1 to"),
        ([MODEL, "--strategy", "full", "--lr", "-1"], 2, "expected a finite number above 0"),
        ([MODEL, "--strategy", "full", "--steps-per-epoch", "0"], 2, "'0' is given; expected greater than"),
        ([MODEL, "--strategy", "full", "--layers", "3"], 2, "--layers: only --rate-table uses it; leave it"),
        ([MODEL, "--plan", "nowhere.yaml"], 1, "does not exist"),
        ([MODEL, "--strategy", "lp_ft:epochs=3", "--epochs", "6"], 1, "epochs is given twice: 3 and 6"),
        ([MODEL, "--plan", "p.yaml", "--epochs", "6"], 1, "epochs and a plan file are both given"),
        ([MODEL, "--plan", "p.yaml", "--norms", "freeze"], 1, "norms and a plan file are both given"),
        ([MODEL, "--plan", "p.yaml", "--granularity", "blocks"], 2, "--granularity and --plan are both"),
        ([MODEL, "--strategy", "full", "-o", "/nowhere/p.yaml"], 2, "/nowhere does not exist"),
        (["--rate-table", "--decay", "0.9,x"], 2, "expected numbers with commas"),
        (["--rate-table", "--decay", "-1"], 1, "decay is -1.0"),
        (["--rate-table", "--lr", "inf"], 2, "'--lr': inf is given; expected a finite number above 0"),
        (["--rate-table", "--plan", "p.yaml", "-o", "t"], 2, "--plan, --out: --rate-table has no use for"),
    ],
)
def test_mistakes_get_one_message(arguments: list[str], code: int, told: str):
    # Usage errors exit with 2, others with 1, both with a message on stderr and no traceback.
    result = command(*arguments)
    assert result.exit_code == code
    assert is_told(told, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split()))
    assert "Traceback" not in result.output


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path):
    # -o never replaces a plan that somebody may have edited.
    out = tmp_path / "plan.yaml"
    out.write_text("mine")
    result = command(MODEL, "--strategy", "full", "-o", out)
    assert result.exit_code == 2
    assert out.read_text() == "mine"


def test_a_plan_for_another_model_lists_both_sides(tmp_path: Path):
    # The groups that only one side has are named.
    out = tmp_path / "plan.yaml"
    assert command(MODEL, "--strategy", "linear_probe", "-o", out).exit_code == 0
    result = command("timm:test_resnet", "--plan", out)
    assert result.exit_code == 1
    assert "only the plan has:" in result.stderr
    assert "only the model has:" in result.stderr


def test_the_command_needs_no_torch_to_print_its_help():
    # --help of the command answers without importing torch.
    code = (
        "import sys; from layerwise.cli.main import app\n"
        "try: app(['plan', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--rate-table" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [[MODEL, "--strategy", "full", "--num-classes", 10**24], ["--rate-table", "--layers", 10**12]],
)
def test_absurd_numbers_are_wrong_usage(arguments: list[object]) -> None:
    # Told at once: torch takes no such number, and no table is so long.
    result = command(*arguments)
    assert result.exit_code == 2
    told = " ".join(re.sub("[│╭╮╰╯]", " ", result.stderr).split())
    assert is_told(f"'{arguments[-1]}' is given; expected less than or equal to", told)
