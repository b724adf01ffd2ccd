"""A checkpoint's card: its metadata is what the Hub reads, its commands work, and a caption in it is a caption."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import GOLDEN
from hub_stub import wrong_metadata
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.__main__ import main
from repro.evaluation.evaluator import Evaluation
from repro.recipes.selftest import command_line, read_case
from repro.record.model_card import CARD, LONGEST_TEXT, SAMPLES, Trained, clean, escaped, is_hub_id, write_card

NAME = "ckpt_epoch_1_step_8"
SPLIT = {
    **{"read": 40, "kept": 38, "dropped": 2, "images": 9, "fingerprint": "0123456789abcdef"},
    **{"captions": 38, "captions_cut": 0, "max_length": 32},
}
any_text = st.text(st.characters(exclude_categories=()))
HAS_TORCH = importlib.util.find_spec("torch") is not None
IS_4 = transformers.__version__.startswith("4.")


def evaluation(rows: list[tuple[str, str, str]], **metrics: float) -> Evaluation:
    """An evaluation of rows of path, caption and reference."""
    return Evaluation(
        metrics={"loss": 2.0153, "gen_len": 11.25, "rouge2": 14.64, **metrics},
        details={"rows": 38, "rouge_intervals": {"rouge2": (14.1, 15.2)}},
        generations=[{"pred": caption, "label": reference} for _, caption, reference in rows],
        image_paths=[path for path, _, _ in rows],
        image_ids=[str(number) for number in range(len(rows))],
    )


def trained(evaluated: Evaluation | None = None, *, splits: dict[str, Any] | None = None, **flags: Any) -> Trained:
    return Trained(
        epoch=1,
        step=8,
        facts={
            "flags": {"max_target_length": 32, "num_beams": 8, "train_file": "/home/me/secret/train.jsonl", **flags},
            "protocol": {"name": "published", "token_eval_loss": False},
            "model": {"parameters": 239_195_904, "notes": ["enc_to_dec_proj: random weights, seed 42"]},
            "data": splits or {"train": SPLIT, "validation": SPLIT},
            "num_replicas": 8,
            "num_steps": 16,
            "steps_per_epoch": 8,
            "platform": "cpu, Linux, Python 3.11.7",
            "versions": {"jax": "0.10.2"},
        },
        flags={"learning_rate": 3e-5, "protocol": "published"},
        device="8 x cpu",
        evaluation=evaluated,
    )


def write(folder: Path, *arguments: Any, **flags: Any) -> ModelCard:
    (folder / NAME).mkdir(exist_ok=True)
    write_card(folder / NAME, trained(*arguments, **flags))
    return ModelCard.load(folder / NAME / CARD)


def table(card: str, header: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    lines = card[card.index(f"| {header}") :].split("\n\n")[0].rstrip("\n").split("\n")[2:]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


@settings(max_examples=25)
@given(st.lists(st.tuples(any_text, any_text, any_text), min_size=1, max_size=3), any_text)
def test_any_caption_is_shown_as_it_is_and_changes_nothing_else(rows, name):
    rows = [(f"/home/me/{number}{path}", *texts) for number, (path, *texts) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        card = write(Path(folder), evaluation(rows), train_file=name or None, hub_model_id=name or None)
        plain = write(Path(folder), evaluation([("/home/me/a.jpg", "a dog", "a cat")]), train_file="x")
    assert card.data.to_dict().keys() == plain.data.to_dict().keys()
    assert re.findall(r"^#+ .*|^```.*", card.text, re.M) == re.findall(r"^#+ .*|^```.*", plain.text, re.M)
    found = table(card.text, "image")
    assert [[html.unescape(cell) for cell in row] for row in found] == [
        [clean(Path(path).name), clean(caption), clean(label)] for path, caption, label in rows
    ]
    for row in found:
        for cell in row:
            assert re.fullmatch(r"(&#\d+;|[^\W_]|[\s.,'-]|[^\x00-\x7f])*", cell)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a man, it's two-faced.", "a man, it's two-faced."),
        ("<img src=x>", "&#60;img src&#61;x&#62;"),
        ("![](http://spy)", "&#33;&#91;&#93;&#40;http&#58;&#47;&#47;spy&#41;"),
        ("| a\n---\n", "&#124; a ---"),
        ("&amp; *b* _c_", "&#38;amp&#59; &#42;b&#42; &#95;c&#95;"),
        ("www.spy.example", "www&#46;spy.example"),
        ("ein Bär 熊", "ein Bär 熊"),
    ],
)
def test_what_could_be_markdown_or_html_is_an_entity(text, written):
    assert escaped(text) == written
    assert html.unescape(written) == clean(text)


def test_what_cannot_be_seen_or_has_no_end_is_made_fit(tmp_path):
    assert "\u202e" not in clean("a \u202edog\u202c")
    clean("\ud800").encode()
    assert len(clean("word " * 10_000)) < LONGEST_TEXT + 40
    assert len(escaped("<" * 10_000)) < 6 * LONGEST_TEXT


def test_metadata_are_what_the_hub_reads(tmp_path):
    rows = [("/home/me/a.jpg", "a dog", "a cat")]
    card = write(
        tmp_path,
        evaluation(rows, rouge1=40.123456, bleu4=0.25, cider=0.9, colour=float("nan")),
        encoder_model_name_or_path="google/vit-base-patch16-224-in21k",
        decoder_model_name_or_path="gpt2",
        dataset_name="ydshieh/coco_dataset_script",
        dataset_config_name="2017",
        splits={"train": SPLIT, "validation": SPLIT | {"read": 25_014}},
        hub_model_id="me/captioner",
    )
    data = card.data.to_dict()
    assert wrong_metadata(data) == []
    (index,) = data.pop("model-index")
    assert data == {
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "vision-encoder-decoder", "jax", "repro"],
        "base_model": ["google/vit-base-patch16-224-in21k", "gpt2"],
        "datasets": ["ydshieh/coco_dataset_script"],
        "metrics": ["bleu", "cider", "loss", "rouge"],
    }
    assert index["name"] == "captioner"
    (result,) = index["results"]
    assert result["task"] == {"type": "image-to-text", "name": "Image captioning"}
    assert result["dataset"] == {"type": "ydshieh/coco_dataset_script", "name": "COCO 2017", "split": "validation"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        *(("loss", 2.0153), ("rouge", 14.64), ("rouge", 40.1235), ("bleu", 0.25), ("cider", 0.9)),
    ]
    assert card.data.eval_results[1].metric_name == "ROUGE-2, F x 100"
    assert "CC BY 4.0" in card.text
    assert table(card.text, "metric")[2] == ["ROUGE-2, F x 100", "14.6400", "14.1000 to 15.2000"]


def test_what_only_looks_like_coco_is_not_called_so(tmp_path):
    card = write(tmp_path, evaluation([("a.jpg", "a", "b")]), dataset_name="ydshieh/coco_dataset_script")
    assert "datasets" not in card.data.to_dict()
    assert card.data.eval_results[0].dataset_name == "images and captions in COCO's layout (2017)"


def test_no_path_of_this_machine_is_told(tmp_path):
    (tmp_path / "models").mkdir()
    card = write(
        tmp_path,
        evaluation([("/home/me/secret/photo.jpg", "a dog", "a cat")]),
        model_name_or_path=str(tmp_path / "models"),
        data_dir="/home/me/secret",
        validation_file="/home/me/secret/val.jsonl",
    )
    text = (tmp_path / NAME / CARD).read_text()
    assert "/home" not in text.replace("&#47;", "/")
    assert str(tmp_path.parent) not in text
    assert "secret" not in text
    assert "val.jsonl, validation" in card.text
    assert "model: folder models" in card.text
    assert table(card.text, "image") == [["photo.jpg", "a dog", "a cat"]]


def test_samples_lie_evenly_and_each_image_is_shown_once(tmp_path):
    rows = [(f"{image:03}.jpg", f"caption {image}", f"reference {n}") for image in range(101) for n in range(5)]
    card = write(tmp_path, evaluation(rows))
    assert table(card.text, "image") == [[f"{n:03}.jpg", f"caption {n}", "reference 0"] for n in range(0, 101, 20)]
    assert len(table(card.text, "image")) == SAMPLES


def test_a_card_that_says_the_same_is_not_written_again(tmp_path):
    write(tmp_path, evaluation([("a.jpg", "a", "b")]))
    before = (tmp_path / NAME / CARD).stat().st_mtime_ns
    write(tmp_path, evaluation([("a.jpg", "a", "b")]))
    assert (tmp_path / NAME / CARD).stat().st_mtime_ns == before
    card = write(tmp_path)
    assert "This checkpoint was not evaluated." in card.text
    assert card.data.eval_results is None


def test_hub_ids_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "model").mkdir()
    assert is_hub_id("gpt2")
    assert is_hub_id("google/vit-base-patch16-224-in21k")
    for name in ("me/model", "/abs/model", "./model", "../model", "a/b/c", "", "my model"):
        assert not is_hub_id(name)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that evaluates the first one's model alone, and its folder."""
    folder = tmp_path_factory.mktemp("card")
    flags = command_line(read_case("current_block0"), folder / "run")
    assert main(["train", *flags]) == 0
    return folder / "run"


def test_every_checkpoint_has_a_card_with_its_own_results(checkpoints):
    folders = sorted(checkpoints.glob("ckpt_*"))
    assert [folder.name for folder in folders] == [NAME, "ckpt_epoch_2_step_16"]
    for folder in folders:
        card = ModelCard.load(folder / CARD)
        results = json.loads((folder / "eval_results.json").read_text())
        measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert measured["loss, nats a token"] == pytest.approx(results["eval_loss"], abs=1e-4)
        assert measured["ROUGE-2, F x 100"] == pytest.approx(results["eval_rouge2"], abs=1e-4)
        assert wrong_metadata(card.data.to_dict()) == []
        said = dict(table(card.text, "flag"))
        assert said["`--learning_rate`"] == "0.003"
        assert not {"`--output_dir`", "`--cache_dir`", "`--resume`", "`--hub_token`"} & set(said)
        assert str(checkpoints.parent) not in card.text


def test_a_checkpoint_that_is_not_evaluated_has_a_card_too(tmp_path):
    flags = command_line(read_case("current_block0"), tmp_path / "run")
    flags.remove("--do_eval")
    assert main(["train", *flags, "--num_train_epochs", "1", "--max_train_samples", "8"]) == 0
    (card,) = (tmp_path / "run").glob(f"ckpt_*/{CARD}")
    assert "This checkpoint was not evaluated." in ModelCard.load(card).text


@pytest.fixture
def place(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of someone who has a checkpoint and a photo."""
    shutil.copytree(checkpoints / NAME, tmp_path / NAME)
    shutil.copy(next((GOLDEN / "inputs" / "images" / "val").iterdir()), tmp_path / "photo.jpg")
    write(tmp_path, max_target_length=8, num_beams=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_snippet(place: Path, word: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the card's code that has a word, and return what it prints."""
    card = (place / NAME / CARD).read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.S) if re.search(word, code)]
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.skipif(not IS_4, reason="transformers 5 has no Flax classes")
def test_the_cards_code_for_the_flax_class_captions(place, capsys):
    assert run_snippet(place, r"\bFlaxVision", capsys)


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed (tox's environment `torch`)")
def test_the_cards_code_for_pytorch_captions(place, capsys):
    assert run_snippet(place, r"import .*\bVisionEncoderDecoderModel", capsys)


@pytest.mark.skipif(not HAS_TORCH or not IS_4, reason="not transformers 4 with PyTorch (`tox -e torch4`)")
@pytest.mark.filterwarnings("ignore:The class `AutoModelForVision2Seq` is deprecated:FutureWarning")  # by 4.57 itself
def test_the_cards_code_for_the_pipeline_says_what_pytorch_says(place, capsys):
    expected = run_snippet(place, r"import .*\bVisionEncoderDecoderModel", capsys)
    assert run_snippet(place, "pipeline", capsys) == expected
