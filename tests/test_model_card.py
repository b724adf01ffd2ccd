"""A checkpoint's card: its metadata is what the Hub reads, its commands work, and a caption in it is a caption.

Captions that are cut and rows without one are counted, and said wherever scores are.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import transformers
from conftest import ENCODER, GOLDEN
from hub_stub import wrong_metadata
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.__main__ import main
from repro.data.captions import caption_lengths
from repro.evaluation.evaluator import Evaluation
from repro.recipes.selftest import command_line, read_case
from repro.record.model_card import CARD, LONGEST_TEXT, Trained, clean, escaped, is_hub_id, write_card

NAME = "ckpt_epoch_1_step_6"
COCO = "ydshieh/coco_dataset_script"
SPLIT = {
    **{"read": 40, "kept": 38, "dropped": 2, "images": 9, "fingerprint": "0123456789abcdef"},
    **{"captions": 38, "captions_cut": 0, "max_length": 32},
}
any_text = st.text(st.characters(exclude_categories=()))
HAS_TORCH = importlib.util.find_spec("torch") is not None
IS_4 = transformers.__version__.startswith("4.")


def evaluation(rows, **metrics):
    """An evaluation of rows of path, caption and reference."""
    return Evaluation(
        metrics={"loss": 2.0153, "gen_len": 11.25, "rouge2": 14.64, **metrics},
        details={"rows": 38, "rouge_intervals": {"rouge2": (14.1, 15.2)}},
        generations=[{"pred": caption, "label": reference} for _, caption, reference in rows],
        image_paths=[path for path, _, _ in rows],
        image_ids=[str(number) for number in range(len(rows))],
    )


def write(folder, evaluated=None, *, read=40, **flags):
    """Write the card of a checkpoint with some evaluation, data and flags, and load it."""
    facts = {
        "flags": {"max_target_length": 32, "num_beams": 8, "train_file": "/home/me/secret/train.jsonl", **flags},
        "protocol": {"name": "published", "token_eval_loss": False},
        "model": {"parameters": 239_195_904, "notes": ["enc_to_dec_proj: random weights, seed 42"]},
        "data": {"train": SPLIT, "validation": SPLIT | {"read": read}},
        **{"num_replicas": 8, "num_steps": 16, "steps_per_epoch": 8},
        **{"platform": "cpu, Linux, Python 3.11.7", "versions": {"jax": "0.10.2"}},
    }
    told = {"learning_rate": 3e-5, "protocol": "published"}
    (folder / NAME).mkdir(exist_ok=True)
    write_card(folder / NAME, Trained(epoch=1, step=6, facts=facts, flags=told, device="8 x cpu", evaluation=evaluated))
    return ModelCard.load(folder / NAME / CARD)


def table(card, header):
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
    assert all(re.fullmatch(r"(&#\d+;|[^\W_]|[\s.,'-]|[^\x00-\x7f])*", cell) for row in found for cell in row)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a man, it's two-faced.", "a man, it's two-faced."),
        ("![](http://spy)", "&#33;&#91;&#93;&#40;http&#58;&#47;&#47;spy&#41;"),
        ("| a\n---\n", "&#124; a ---"),
        ("<b> &amp; *b* _c_", "&#60;b&#62; &#38;amp&#59; &#42;b&#42; &#95;c&#95;"),
        ("www.spy.example", "www&#46;spy.example"),
        ("ein Bär 熊", "ein Bär 熊"),
    ],
)
def test_what_could_be_markdown_or_html_is_an_entity(text, written):
    assert escaped(text) == written
    assert html.unescape(written) == clean(text)


def test_what_cannot_be_seen_or_has_no_end_is_made_fit():
    assert "\u202e" not in clean("a \u202edog\u202c")
    assert len(clean("word " * 10_000)) < LONGEST_TEXT + 40
    assert len(escaped("<" * 10_000)) < 6 * LONGEST_TEXT


def test_metadata_are_what_the_hub_reads(tmp_path):
    evaluated = evaluation([("a.jpg", "a", "b")], rouge1=40.123456, bleu4=0.25, cider=0.9, colour=float("nan"))
    flags = {"encoder_model_name_or_path": ENCODER, "decoder_model_name_or_path": "gpt2", "dataset_name": COCO}
    card = write(tmp_path, evaluated, read=25_014, dataset_config_name="2017", hub_model_id="me/captioner", **flags)
    data = card.data.to_dict()
    assert wrong_metadata(data) == []
    (index,) = data.pop("model-index")
    assert data == {
        **{"language": "en", "library_name": "transformers", "pipeline_tag": "image-to-text"},
        **{"base_model": [ENCODER, "gpt2"], "datasets": [COCO], "metrics": ["bleu", "cider", "loss", "rouge"]},
        "tags": ["image-captioning", "vision-encoder-decoder", "jax", "repro"],
    }
    assert index["name"] == "captioner"
    (result,) = index["results"]
    assert result["task"] == {"type": "image-to-text", "name": "Image captioning"}
    assert result["dataset"] == {"type": COCO, "name": "COCO 2017", "split": "validation"}
    measured = [(metric["type"], metric["value"]) for metric in result["metrics"]]
    assert measured == [("loss", 2.0153), ("rouge", 14.64), ("rouge", 40.1235), ("bleu", 0.25), ("cider", 0.9)]
    assert card.data.eval_results[1].metric_name == "ROUGE-2, F x 100"
    assert "CC BY 4.0" in card.text
    assert table(card.text, "metric")[2] == ["ROUGE-2, F x 100", "14.6400", "14.1000 to 15.2000"]


def test_what_only_looks_like_coco_is_not_called_so(tmp_path):
    card = write(tmp_path, evaluation([("a.jpg", "a", "b")]), dataset_name=COCO)
    assert "datasets" not in card.data.to_dict()
    assert card.data.eval_results[0].dataset_name == "images and captions in COCO's layout (2017)"


def test_no_path_of_this_machine_is_told(tmp_path):
    (tmp_path / "models").mkdir()
    evaluated = evaluation([("/home/me/secret/photo.jpg", "a dog", "a cat")])
    flags = {"data_dir": "/home/me/secret", "validation_file": "/home/me/secret/val.jsonl"}
    card = write(tmp_path, evaluated, model_name_or_path=str(tmp_path / "models"), **flags)
    text = html.unescape((tmp_path / NAME / CARD).read_text())
    assert not [private for private in ("/home", str(tmp_path.parent), "secret") if private in text]
    assert "val.jsonl, validation" in card.text
    assert "model: folder models" in card.text
    assert table(card.text, "image") == [["photo.jpg", "a dog", "a cat"]]


def test_samples_lie_evenly_and_each_image_is_shown_once(tmp_path):
    rows = [(f"{image:03}.jpg", f"caption {image}", f"reference {n}") for image in range(101) for n in range(5)]
    card = write(tmp_path, evaluation(rows))
    assert table(card.text, "image") == [[f"{n:03}.jpg", f"caption {n}", "reference 0"] for n in range(0, 101, 20)]


def test_a_card_that_says_the_same_is_not_written_again_and_no_evaluation_is_said(tmp_path):
    evaluated = evaluation([("a.jpg", "a", "b")])
    write(tmp_path, evaluated)
    before = (tmp_path / NAME / CARD).stat().st_mtime_ns
    write(tmp_path, evaluated)
    assert (tmp_path / NAME / CARD).stat().st_mtime_ns == before
    card = write(tmp_path)
    assert "This checkpoint was not evaluated." in card.text
    assert card.data.eval_results is None


def test_hub_ids_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    names = ("gpt2", ENCODER, "me/model", "/abs/model", "./model", "../model", "a/b/c", "", "my model")
    assert [name for name in names if is_hub_id(name)] == ["gpt2", ENCODER]


INPUTS = GOLDEN / "inputs"
TEST = [json.loads(line) for line in (INPUTS / "test.jsonl").read_text().splitlines()]
TEST = [{**row, "image_path": str(INPUTS / row["image_path"])} for row in TEST]
TEST[1]["caption"] = None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with two checkpoints, captions that are cut, and a row to predict that has none."""
    folder = tmp_path_factory.mktemp("card") / "run"
    test = folder.with_name("test.jsonl")
    test.write_text("".join(json.dumps(row) + "\n" for row in TEST))
    flags = ["--test_file", str(test), "--protocol", "exact", "--max_target_length", "8", "--num_beams", "1"]
    assert main(["train", *command_line(read_case("current_1dev"), folder), *flags, "--eval_steps", "6"]) == 0
    return folder


def test_every_checkpoint_has_a_card_with_its_own_results(run):
    folders = sorted(run.glob("ckpt_*"))
    assert [folder.name for folder in folders] == ["ckpt_epoch_1_step_12", NAME]
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
        assert str(run.parent) not in card.text


def test_cut_captions_and_missing_ones_are_said_in_log_record_report_and_card(run, tokenizer):
    facts, log = json.loads((run / "run.json").read_text())["data"], (run / "log").read_text()
    for split, name, use in (("train", "train", "trained on"), ("validation", "val", "scored against")):
        counts, lines = facts[split], (INPUTS / f"{name}.jsonl").read_text().splitlines()
        lengths = caption_lengths([json.loads(line)["caption"] for line in lines], tokenizer)
        assert 0 < counts["captions_cut"] <= sum(lengths > counts["max_length"])
        assert counts["captions"] == counts["kept"]
        cut = f"{counts['captions_cut']} of {counts['captions']} captions are longer than {counts['max_length']} tokens"
        assert f"{split}: {cut}; what is left of them is {use}" in log
    cut = f"{facts['validation']['captions_cut']} of {facts['validation']['captions']} were cut at"
    card = (run / NAME / CARD).read_text()
    assert card.count(cut) == 2, "beside the scores and in the table of the data"

    rows = len(TEST)
    assert facts["test"]["kept"] - facts["test"]["captions"] == 1
    assert f"test: 1 of {rows} rows have no caption; loss and scores are of the other {rows - 1}" in log
    assert {"test_loss", "test_rouge2", "test_gen_len"} <= set(json.loads((run / "test_results.json").read_text()))
    generations = json.loads((run / "test_generation.json").read_text())
    assert [row["label"] == "" for row in generations] == [row["caption"] is None for row in TEST]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    assert (last["rows"], last["rows_scored"]) == (rows, rows - 1)

    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    said = {split: f"captions_cut {facts[split]['captions_cut']}" for split in ("train", "validation")}
    for split, count in (said | {"test": f"captions {rows - 1}"}).items():
        assert re.search(rf'<th scope="row">{split}</th><td[^>]*>[^<]*\b{count}[,<]', page)


@pytest.fixture
def run_snippet(run, tmp_path, monkeypatch, capsys):
    """Runs the card's code that has a word, where a checkpoint and a photo are, and gives what it prints."""
    shutil.copytree(run / NAME, tmp_path / NAME)
    shutil.copy(next((INPUTS / "images" / "val").iterdir()), tmp_path / "photo.jpg")
    card = write(tmp_path, max_target_length=8, num_beams=1).text
    monkeypatch.chdir(tmp_path)

    def execute(word):
        (code,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.S) if re.search(word, code)]
        capsys.readouterr()
        exec(code, {})
        return capsys.readouterr().out.strip()

    return execute


@pytest.mark.slow
@pytest.mark.skipif(not IS_4, reason="transformers 5 has no Flax classes")
def test_the_cards_code_for_the_flax_class_captions(run_snippet):
    assert run_snippet(r"\bFlaxVision")


IN_PYTORCH = r"import .*\bVisionEncoderDecoderModel"


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed (tox's environment `torch`)")
def test_the_cards_code_for_pytorch_captions(run_snippet):
    assert run_snippet(IN_PYTORCH)


@pytest.mark.skipif(not HAS_TORCH or not IS_4, reason="not transformers 4 with PyTorch (`tox -e torch4`)")
@pytest.mark.filterwarnings("ignore:The class `AutoModelForVision2Seq` is deprecated:FutureWarning")  # by 4.57 itself
def test_the_cards_code_for_the_pipeline_says_what_pytorch_says(run_snippet):
    assert run_snippet("pipeline") == run_snippet(IN_PYTORCH)
