"""The quality gate holds for the model, and for no damaged one. Figures: pytest -s."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

import models
from models import build, graph, quality
from models.quality import CANARIES, TEXTS, Canary

Change = Callable[[np.ndarray], np.ndarray]
WORKFLOW = Path(__file__).parents[1] / ".github" / "workflows" / "image.yml"
LEAST_GAP = 1.0  # logits between a canary's token and the next that may stand there
OUTPUT, GATE_UP = 1, 2  # among a layer's four matrices, in the graph's order


class Damager:
    """The real ONNX file, from which it saves damaged copies."""

    def __init__(self, files: build.Files) -> None:
        self._files = files
        self._model = onnx.load(files.graph)
        self._tensors = {one.name: one for one in self._model.graph.initializer}
        self._matrices = [
            node.input[1].removesuffix("_codes")
            for node in self._model.graph.node
            if node.op_type == "MatMulNBits"
        ]

    def matrix(self, layer: int, place: int) -> str:
        return self._matrices[4 * layer + place]

    def array(self, name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(self._tensors[name])

    def save(self, folder: Path, changes: dict[str, np.ndarray]) -> Path:
        """A copy with other contents in some tensors, and the tokenizer beside it."""
        before = {name: self._tensors[name].raw_data for name in changes}
        for name, array in changes.items():
            self._tensors[name].raw_data = array.tobytes()
        path = folder / self._files.graph.name
        onnx.save(self._model, path)
        for name, raw in before.items():
            self._tensors[name].raw_data = raw
        shutil.copy(self._files.tokenizer, folder)
        return path


@pytest.fixture(scope="module")
def files() -> build.Files:
    return build.ensure()


@pytest.fixture(scope="module")
def damager(files: build.Files) -> Damager:
    return Damager(files)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Room for a copy of 109 MB, empty again at once."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def gate(*argv: str | Path) -> int:
    return quality.main([str(one) for one in argv])


# The model itself.


def test_the_model_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "verdict.json"
    assert gate("--json", path) == 0
    printed = capsys.readouterr().out
    print(f"\n{printed}")
    assert "the gate holds" in printed
    verdict = json.loads(path.read_text())
    assert verdict["measured"]["tokens"] >= 5_000
    assert len(verdict["checks"]) == 2 + len(CANARIES)
    assert all(check["holds"] for check in verdict["checks"])


def test_the_shipped_baseline_is_what_this_model_records(files: build.Files):
    """Up to what another CPU's kernels make of it, far within the tolerances."""
    shipped, shipped_kept = quality.load_baseline()
    again, kept = quality.record(files, TEXTS)
    assert again.perplexity == pytest.approx(shipped.perplexity, rel=0.002)
    assert again.kl == pytest.approx(shipped.kl, rel=0.1)
    assert (
        replace(
            again, perplexity=shipped.perplexity, kl=shipped.kl, most_kl=shipped.most_kl
        )
        == shipped
    )
    # Where two tokens are about as likely, another CPU may keep the other one.
    same = kept.ids == shipped_kept.ids
    assert same.mean() > 0.99
    whole = same.all(axis=1)
    np.testing.assert_allclose(
        np.exp(kept.log_probabilities[whole]),
        np.exp(shipped_kept.log_probabilities[whole]),
        atol=1e-3,
    )


def smallest_gap(model: models.Model, canary: Canary) -> float:
    """Logits from each token of the answer to the next likeliest that is allowed."""
    if canary.kind == "classify":
        (scores,) = model.classify(canary.prompt, canary.labels)
        second, first = sorted(scores.values())[-2:]
        return math.log(first / second)
    ids, sampling = quality.asked(model, canary)
    answer = model.generate(ids, replace(sampling, logprobs=20))
    matcher = None
    if sampling.grammar is not None:
        matcher = sampling.grammar.compile(model.tokenizer).matcher()
    gaps = []
    for token in answer.tokens:
        allowed = matcher.allowed() if matcher else None
        rivals = [
            logprob
            for id, _, _, logprob in token.top
            if id != token.id and (allowed is None or allowed[id])
        ]
        gaps.append(token.logprob - max(rivals, default=-math.inf))
        if matcher:
            matcher.accept(token.id)
    return min(gaps)


def test_no_canary_is_a_near_tie():
    """Every CPU gives the answer of the baseline, in int4 and in float32."""
    answers = []
    for precision in ("int4", "float32"):
        with models.load(graph=precision, rows=1, shelf=0, context=384) as model:
            gaps = {one.prompt: smallest_gap(model, one) for one in CANARIES}
            answers.append({one.prompt: quality.answer(model, one) for one in CANARIES})
        print(f"\n{precision}: smallest gap {min(gaps.values()):.2f} logits")
        assert not {prompt: gap for prompt, gap in gaps.items() if gap < LEAST_GAP}
    baseline, _ = quality.load_baseline()
    assert answers[0] == answers[1] == baseline.answers


def test_the_canary_of_a_schema_is_that_json():
    baseline, _ = quality.load_baseline()
    (prompt,) = [one.prompt for one in CANARIES if one.kind == "extract"]
    found = json.loads(baseline.answers[prompt])
    assert found == {"item": "pizza", "size": "large", "count": 3}


# Damage that leaves a file which loads and answers.


def flipped(count: int) -> Change:
    """Other values in some bytes, always the same ones."""

    def change(array: np.ndarray) -> np.ndarray:
        raw, random = bytearray(array.tobytes()), np.random.default_rng(0)
        for place in random.choice(len(raw), count, replace=False):
            raw[place] ^= int(random.integers(1, 256))
        return np.frombuffer(bytes(raw), array.dtype)

    return change


def one_more(zeros: np.ndarray) -> np.ndarray:
    """Every 4-bit zero point one higher, two of them in a byte."""
    low, high = np.minimum((zeros & 15) + 1, 15), np.minimum((zeros >> 4) + 1, 15)
    return (low | (high << 4)).astype(np.uint8)


@pytest.mark.parametrize(
    ("layer", "place", "part", "change"),
    [
        pytest.param(15, GATE_UP, "codes", flipped(10_000), id="1 % of a matrix"),
        pytest.param(28, OUTPUT, "zero", one_more, id="zero points off by one"),
    ],
)
def test_subtle_damage_shows_in_kl(
    layer: int,
    place: int,
    part: str,
    change: Change,
    damager: Damager,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    """One of 120 matrices: perplexity and every canary stay, and would let it pass."""
    name = f"{damager.matrix(layer, place)}_{part}"
    path = damager.save(folder, {name: change(damager.array(name))})
    assert gate("--graph", path) == 1
    printed = capsys.readouterr().out
    print(f"\n{printed}")
    assert "1 check failed" in printed
    assert "\nKL, nats  at most 0.00" in printed
    assert "\ncheck     expected" in printed
    assert "\ndo: build it again: python -m models --rebuild" in printed


def test_swapped_layers_are_refused_by_every_measure(
    damager: Damager, folder: Path, capsys: pytest.CaptureFixture[str]
):
    pairs = [(damager.matrix(1, i), damager.matrix(20, i)) for i in range(4)]
    changes = {
        f"{to}_{part}": damager.array(f"{source}_{part}")
        for pair in pairs
        for to, source in (pair, pair[::-1])
        for part in ("codes", "scale", "zero")
    }
    assert gate("--graph", damager.save(folder, changes)) == 1
    printed = capsys.readouterr().out
    print(f"\n{printed}")
    for name in ("perplexity", "KL, nats", "chat: ", "complete: "):
        assert f"\n{name}" in printed


def test_damage_behind_a_correct_digest_is_refused(
    files: build.Files,
    damager: Damager,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A build that went wrong records the digest of what it made: a layer of zeros."""
    scales = [f"{damager.matrix(15, place)}_scale" for place in range(4)]
    path = damager.save(folder, {one: 0 * damager.array(one) for one in scales})
    record = files.graph.with_suffix(".json")
    wrong = json.loads(record.read_text())
    wrong["files"][path.name] = build.digest(path)
    (folder / record.name).write_text(json.dumps(wrong))
    monkeypatch.setenv("MODEL_DIR", str(folder))
    assert build.ensure().graph == path  # nothing else notices
    assert gate() == 1
    printed = capsys.readouterr().out
    print(f"\n{printed}")
    assert "\nperplexity" in printed
    assert "\nKL, nats" in printed


def test_numbers_that_are_none_are_refused(
    damager: Damager, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """Wrong bytes in scales: some are then infinite."""
    name = f"{damager.matrix(15, GATE_UP)}_scale"
    path = damager.save(folder, {name: flipped(100)(damager.array(name))})
    assert gate("--graph", path) == 1
    printed = capsys.readouterr().out
    assert "nan" in printed
    assert f"{2 + len(CANARIES)} checks failed" in printed


def test_what_the_gate_cannot_see(damager: Damager, folder: Path):
    """The limit, so that nobody trusts it further: 100 bytes of 930,000 in one matrix.

    That changes less than another CPU's rounding does. Digests are there to find it.
    """
    name = f"{damager.matrix(15, GATE_UP)}_codes"
    path = damager.save(folder, {name: flipped(100)(damager.array(name))})
    assert gate("--graph", path) == 0


def test_a_baseline_is_not_recorded_from_a_damaged_graph(
    files: build.Files, damager: Damager, folder: Path
):
    texts = folder / "texts"
    texts.mkdir()
    shutil.copy(TEXTS / "maths.txt", texts)
    name = f"{damager.matrix(15, GATE_UP)}_scale"
    path = damager.save(folder, {name: np.zeros_like(damager.array(name))})
    with pytest.raises(
        models.ModelError, match=r"as good as float32.*found perplexity"
    ):
        quality.record(replace(files, graph=path), texts)


# What cannot be measured.


def cannot(
    capsys: pytest.CaptureFixture[str], *argv: str | Path, says: tuple[str, ...] = ()
) -> None:
    """Status 2, and a message that tells what to do."""
    assert gate(*argv) == 2
    message = capsys.readouterr().err
    for part in ("expected", "found", *says):
        assert part in message
    assert "Traceback" not in message


def test_a_truncated_graph(
    files: build.Files, folder: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(files.tokenizer, folder)
    path = folder / "half.onnx"
    shutil.copy(files.graph, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    cannot(capsys, "--graph", path, says=("half.onnx", "--rebuild"))


def test_another_network(
    files: build.Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(files.tokenizer, tmp_path)
    value = graph._value("x", np.float32, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node], "other", [value], [graph._value("y", np.float32, [1])]
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(made, tmp_path / "other.onnx")
    cannot(capsys, "--graph", tmp_path / "other.onnx", says=("other.onnx",))


def test_no_graph_and_no_tokenizer(
    files: build.Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cannot(capsys, "--graph", tmp_path / "none.onnx", says=("none.onnx",))
    (tmp_path / "alone.onnx").symlink_to(files.graph)
    cannot(capsys, "--graph", tmp_path / "alone.onnx", says=("tokenizer.json",))


def test_no_built_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The gate builds nothing: it would measure another model than is shipped."""
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    cannot(capsys, says=("python -m models", "MODEL_DIR"))
    assert not list(tmp_path.iterdir())


def test_other_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cannot(capsys, "--texts", tmp_path, says=("--texts tests/texts",))
    shutil.copy(TEXTS / "prose.txt", tmp_path)
    cannot(capsys, "--texts", tmp_path, says=("SHA-256", "--record"))


def test_another_tokenizer(
    files: build.Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "model.onnx").symlink_to(files.graph)
    tokenizer = json.loads(files.tokenizer.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1000]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    cannot(capsys, "--graph", tmp_path / "model.onnx", says=("tokenizer",))


@pytest.mark.parametrize("content", ["", "{}", '{"texts": "x", "mean": 1}', "[1]"])
def test_a_damaged_baseline(content: str, tmp_path: Path):
    path = tmp_path / "quality.json"
    path.write_text(content)
    with pytest.raises(models.ModelError, match=r"expected a recorded baseline.*found"):
        quality.load_baseline(path)


def test_a_baseline_of_other_canaries(tmp_path: Path):
    baseline, kept = quality.load_baseline()
    path = tmp_path / "quality.json"
    quality.save_baseline(replace(baseline, answers={"Who?": "I"}), kept, path)
    with pytest.raises(models.ModelError, match="11 canaries, found others'"):
        quality.load_baseline(path)
    quality.save_baseline(baseline, kept, path)
    assert quality.load_baseline(path)[0] == baseline


# The pipeline that asks the gate before it tags an image.


@pytest.fixture(scope="module")
def steps() -> list[dict]:
    """The steps of the image's workflow, in the order they run."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    return job["steps"]


def place_of(steps: list[dict], part: str) -> int:
    """The only step that runs or uses something with this in it."""
    (place,) = [
        place
        for place, step in enumerate(steps)
        if part in step.get("run", "") + step.get("uses", "")
    ]
    return place


def test_the_workflow_is_sound():
    """zizmor knows the schema and what goes wrong: loose tokens, unpinned actions."""
    zizmor = Path(sysconfig.get_path("scripts")) / "zizmor"
    argv = [zizmor, "--offline", "--no-progress", "--persona", "regular", WORKFLOW]
    found = subprocess.run(argv, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_nothing_is_tagged_before_everything_held(steps: list[dict]):
    order = ["docker build", "models.quality", "-m docker", "syft scan", "scan-action"]
    order += ["docker push"]
    places = [place_of(steps, part) for part in order]
    assert places == sorted(places)
    assert places[-1] == len(steps) - 1
    assert not [step for step in steps if "continue-on-error" in step]
    assert [step for step in steps if "if" in step] == steps[-1:]  # none is left out


def test_only_the_default_branch_pushes(steps: list[dict]):
    condition = " ".join(steps[-1]["if"].split())
    assert condition == (
        "github.event_name == 'push' && "
        "github.ref_name == github.event.repository.default_branch"
    )
    assert "secrets." not in json.dumps(steps[:-1])


def test_the_gate_runs_in_the_candidate_itself(steps: list[dict]):
    script = steps[place_of(steps, "models.quality")]["run"]
    command = shlex.split(script.replace("\\\n", ""))
    assert command[:2] == ["docker", "run"]
    inside = command[command.index("$CANDIDATE") + 1 : command.index("|")]
    assert inside[:3] == ["python", "-m", "models.quality"]
    assert quality._parser().parse_args(inside[3:]).texts == Path("/texts")
    assert "$PWD/tests/texts:/texts:ro" in command
