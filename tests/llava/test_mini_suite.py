"""The embedded benchmarks: the same rows everywhere, in the real columns, scored by the real tasks' own code."""

from __future__ import annotations

import json
import shutil
import threading
from ast import literal_eval
from collections import Counter
from importlib import import_module
from pathlib import Path
from statistics import mode

import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")

from llava.benchmarks import PAPER  # noqa: E402
from llava.mini import suite  # noqa: E402
from llava.mini.benchmarks import BUILDERS, Table  # noqa: E402
from llava.mini.captions import CAPTION_PROMPT  # noqa: E402

RECORDED = json.loads(suite.RECORD_FILE.read_text())
ELEVEN = suite.tasks_of(PAPER)


@pytest.fixture(scope="module")
def tables() -> dict[str, list[Table]]:
    """Builtin task name of the eleven -> its tables, made anew."""
    return {benchmark.name: BUILDERS[benchmark.name]() for benchmark in ELEVEN.values()}


@pytest.fixture(scope="module")
def root(tmp_path_factory, tables) -> Path:
    """A suite on disk, built from `tables`."""
    folder = tmp_path_factory.mktemp("mini") / "suite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "BUILDERS", {name: lambda made=made: made for name, made in tables.items()})
        return suite.prepare(folder)


@pytest.fixture(scope="module")
def docs(root, tmp_path_factory) -> dict[str, datasets.Dataset]:
    """Builtin task name -> its questions, read back."""
    cache = str(tmp_path_factory.mktemp("arrow"))
    return {
        benchmark.name: datasets.load_dataset(
            str(root / benchmark.data.folder), benchmark.data.config, split=benchmark.data.split, cache_dir=cache
        )
        for benchmark in ELEVEN.values()
    }


def test_all_are_there_with_two_hundred_questions_each(docs):
    assert set(suite.TASKS) == {f"mini_{name}" for name in BUILDERS}
    assert len(ELEVEN) == 11
    for task, benchmark in ELEVEN.items():
        assert len(docs[benchmark.name]) == suite.rows_of(task) >= 200


@pytest.mark.parametrize("name", RECORDED)
def test_rows_and_pixels_are_the_same_on_every_machine(name, root, tmp_path):
    folder, config, split = name.rsplit("/", 2)
    rows = datasets.load_dataset(str(root / folder), config, split=split, cache_dir=str(tmp_path))
    assert len(rows) == RECORDED[name]["rows"]
    assert suite.table_hash(rows) == RECORDED[name]["sha256"]


def test_the_version_changes_with_the_content(tmp_path, monkeypatch):
    changed = {name: dict(table) for name, table in RECORDED.items()}
    changed[next(iter(changed))]["sha256"] = "0" * 64
    record = tmp_path / "suite.json"
    record.write_text(json.dumps(changed))
    monkeypatch.setitem(suite.RECORD_FILES, PAPER, record)
    assert suite.version_of() != suite.VERSION


def test_a_hash_sees_every_pixel_and_value():
    image = Image.new("RGB", (4, 4))
    other = image.copy()
    other.putpixel((3, 3), (0, 0, 1))
    row = {"image": image, "nested": [{"text": "a"}], "missing": None}
    hashes = {suite.table_hash([r]) for r in (row, {**row, "image": other}, {**row, "nested": [{"text": "b"}]})}
    assert len(hashes) == 3


def test_no_question_is_asked_twice_about_a_image(docs):
    for name in ("pope", "mme", "mmbench_en_dev", "ok_vqa_val2014"):
        asked = Counter((row["question"], row["image"].tobytes()) for row in docs[name])
        assert max(asked.values()) == 1


def test_yes_and_no_are_equally_frequent(docs):
    assert Counter(docs["pope"]["answer"]) == {"yes": 108, "no": 108}
    assert Counter(docs["mme"]["answer"]) == {"Yes": 108, "No": 108}
    gqa = Counter(docs["gqa"]["answer"])
    assert abs(gqa["yes"] - gqa["no"]) <= 2


def test_letters_are_equally_frequent(docs):
    by_number = {4: Counter(), 3: Counter(), 2: Counter()}
    for row in docs["mmbench_en_dev"]:
        by_number[sum(row[letter] != "nan" for letter in "ABCD")][row["answer"]] += 1
    for row in docs["scienceqa_img"].select_columns(["choices", "answer"]):
        by_number[len(row["choices"])]["ABCD"[row["answer"]]] += 1
    for row in docs["seedbench"].select_columns(["answer"]):
        by_number[4][row["answer"]] += 1
    for row in docs["mmmu_val"].select_columns(["options", "answer"]):
        if row["options"] != "[]":
            by_number[len(literal_eval(row["options"]))][row["answer"]] += 1
    for n, given in by_number.items():
        # Each of the four sets may be one off.
        assert len(given) == n and max(given.values()) - min(given.values()) <= 4, (n, given)


def test_pope_asks_each_way_equally_often(docs):
    asked = Counter(zip(docs["pope"]["category"], docs["pope"]["answer"], strict=True))
    assert set(asked.values()) == {36} and {c for c, _ in asked} == {"random", "popular", "adversarial"}


def test_mme_asks_in_pairs_one_after_the_other(docs):
    ids, answers = docs["mme"]["question_id"][:], docs["mme"]["answer"][:]
    assert ids[::2] == ids[1::2] and len(set(ids)) == len(ids) // 2
    assert all({a, b} == {"Yes", "No"} for a, b in zip(answers[::2], answers[1::2], strict=True))


def test_some_questions_come_without_an_image_and_some_with_two(docs):
    assert sum(image is None for image in docs["scienceqa_img"]["image"]) == 20
    two = [row for row in docs["mmmu_val"] if row["image_2"] is not None]
    assert len(two) == 36 and all("<image 2>" in row["question"] for row in two)


SHORT = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
LETTER = {"pre_prompt": "", "post_prompt": "\nAnswer with the option's letter from the given choices directly."}
OK_VQA = {
    "pre_prompt": "",
    "post_prompt": "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    + SHORT["post_prompt"],
}
MMMU = {
    "prompt_type": "format",
    "multiple_choice_prompt": LETTER["post_prompt"].strip(),
    "open_ended_prompt": SHORT["post_prompt"].strip(),
}


@pytest.fixture(scope="module")
def builtin():
    """lmms-eval's own modules."""
    pytest.importorskip("lmms_eval.tasks")
    names = ("gqa", "mmbench", "mme", "mmmu", "ok_vqa", "pope", "scienceqa", "seedbench")
    module = {"mmbench": "en_utils"}
    return {name: import_module(f"lmms_eval.tasks.{name}.{module.get(name, 'utils')}") for name in names}


def test_builtin_prompts_are_those_of_training(builtin, docs, tables):
    ask = {
        "gqa": lambda doc: builtin["gqa"].gqa_doc_to_text(doc, SHORT),
        "mmbench_en_dev": lambda doc: builtin["mmbench"].mmbench_doc_to_text(doc, LETTER),
        "mme": lambda doc: builtin["mme"].mme_doc_to_text(doc, SHORT),
        "mmmu_val": lambda doc: builtin["mmmu"].mmmu_doc_to_text(doc, MMMU),
        "ok_vqa_val2014": lambda doc: builtin["ok_vqa"].ok_vqa_doc_to_text(doc, OK_VQA),
        "pope": lambda doc: builtin["pope"].pope_doc_to_text(doc, SHORT),
        "scienceqa_img": lambda doc: builtin["scienceqa"].sqa_doc_to_text(doc, {**LETTER, "format": "default"}),
        "seedbench": builtin["seedbench"].seed_doc_to_text,
    }
    for name, prompt_of in ask.items():
        assert [prompt_of(doc) for doc in docs[name]] == tables[name][0].prompts, name
    for name in ("coco2017_cap_val", "flickr30k_test", "nocaps_val"):
        assert set(tables[name][0].prompts) == {CAPTION_PROMPT}


def test_a_process_in_the_suite_finds_gqas_images_by_their_hub_name(root, docs, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    images = datasets.load_dataset(
        "lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev", cache_dir=str(tmp_path)
    )
    assert set(docs["gqa"]["imageId"]) == set(images["id"])


OTHER = {"yes": "no", "no": "yes", "A": "B", "B": "A", "C": "A", "D": "A"}


def said(answer: str, right: bool) -> str:
    """What a model says that is always right, or always wrong."""
    return answer if right else OTHER.get(answer, "nothing of the kind")


@pytest.mark.parametrize("right", [True, False])
def test_the_real_tasks_score_them(builtin, docs, right):
    def scored(name: str, process, answer_of) -> list[dict]:
        return [process(doc, [said(answer_of(doc), right)]) for doc in docs[name]]

    def of(name: str):
        return lambda doc: doc[name]

    pope, mme, mmbench, mmmu, seedbench = (builtin[name] for name in ("pope", "mme", "mmbench", "mmmu", "seedbench"))
    found = scored("pope", pope.pope_process_results, of("answer"))
    assert pope.pope_aggregate_f1_score([r["pope_f1_score"] for r in found]) == right
    assert pope.pope_aggregate_accuracy([r["pope_accuracy"] for r in found]) == right

    found = scored("mme", mme.mme_process_results, lambda doc: doc["answer"].lower())
    # 200 a category: six of perception, four of cognition.
    for key, most in (("mme_perception_score", 1200), ("mme_cognition_score", 800)):
        assert mme.mme_aggregate_results([r[key] for r in found if key in r]) == most * right

    found = [r["gpt_eval_score"] for r in scored("mmbench_en_dev", mmbench.mmbench_process_results, of("answer"))]
    assert mmbench.mmbench_evaluator.eval_result(found, eval_method="static")[0] == right

    found = [r["mmmu_acc"] for r in scored("mmmu_val", mmmu.mmmu_process_results, of("answer"))]
    assert mmmu.mmmu_aggregate_results(found) == right
    known = {subject for subjects in mmmu.DOMAIN_CAT2SUB_CAT.values() for subject in subjects}
    assert {r["subdomain"] for r in found} <= known

    found = scored("seedbench", seedbench.seed_process_result, of("answer"))
    for key in ("seed_image", "seed_all"):
        assert seedbench.seed_aggregation_result([r[key] for r in found]) == right

    for name, process, answer_of in (
        ("ok_vqa_val2014", builtin["ok_vqa"].ok_vqa_process_results, lambda doc: mode(doc["answers"])),
        ("scienceqa_img", builtin["scienceqa"].sqa_process_results, lambda doc: "ABCD"[doc["answer"]]),
    ):
        assert {r["exact_match"] for r in scored(name, process, answer_of)} == {right}


def test_a_caption_of_the_image_beats_a_caption_of_another_one(docs):
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    for name, column in (
        ("coco2017_cap_val", "answer"),
        ("flickr30k_test", "caption"),
        ("nocaps_val", "annotations_captions"),
    ):
        captions = [[text.lower().strip(".") for text in texts] for texts in docs[name][column]]
        # Each image's first reference stands for a model's caption and is scored against the others.
        references = dict(enumerate(texts[1:] for texts in captions))
        own, _ = cider.compute_score(references, {i: [texts[0]] for i, texts in enumerate(captions)})
        next_one = {i: [captions[i - 1][0]] for i in references}
        others, _ = cider.compute_score(references, next_one)
        assert own > 1 and own > 5 * others


@pytest.fixture
def quick(monkeypatch):
    """Building writes one small table; returns how often it was asked to."""
    builds = []

    def build(folder: Path, group: str) -> None:
        builds.append(folder)
        (folder / "POPE").mkdir(parents=True)
        (folder / "POPE" / "test.parquet").write_bytes(b"table")

    monkeypatch.setattr(suite, "_build", build)
    return builds


def test_a_suite_is_built_once_unless_forced_or_of_another_version(quick, tmp_path, capsys):
    folder = tmp_path / "some" / "suite"
    assert suite.prepare(folder) == suite.prepare(str(folder)) == folder and len(quick) == 1
    assert suite.main(["--output", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder) and len(quick) == 1
    (folder / "stray").touch()
    suite.prepare(folder, force=True)
    assert len(quick) == 2 and not (folder / "stray").exists()
    (folder / suite.MARKER).write_text('{"version": "0"}')
    suite.prepare(folder)
    assert len(quick) == 3 and json.loads((folder / suite.MARKER).read_text())["version"] == suite.VERSION


def test_of_many_at_once_one_builds(quick, tmp_path):
    start, found = threading.Barrier(4), []

    def want() -> None:
        start.wait()
        found.append(suite.prepare(tmp_path / "suite"))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "suite"] * 4 and len(quick) == 1


@pytest.mark.parametrize("damage", ["file gone", "folder gone", "file cut", "marker gone", "marker cut"])
def test_a_suite_that_was_deleted_in_part_is_built_again(quick, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LLAVA_MINI_CACHE", str(tmp_path))
    root = suite.prepare()
    table, marker = root / "POPE" / "test.parquet", root / suite.MARKER
    {
        "file gone": table.unlink,
        "folder gone": lambda: shutil.rmtree(table.parent),
        "file cut": lambda: table.write_bytes(b"ta"),
        "marker gone": marker.unlink,
        "marker cut": lambda: marker.write_text("{"),
    }[damage]()
    assert suite.prepare() == root and len(quick) == 2
    assert table.read_bytes() == b"table"
    assert suite.prepare() == root and len(quick) == 2


@pytest.mark.parametrize("variable", ["LLAVA_MINI_CACHE", "XDG_CACHE_HOME", None])
def test_without_a_home_folder_the_variable_is_named(monkeypatch, tmp_path, variable):
    monkeypatch.setenv("LLAVA_MINI_CACHE", str(tmp_path))
    assert suite.default_root() == tmp_path / f"mini-suite-{suite.VERSION}"

    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LLAVA_MINI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "~nobody/cache")
    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(OSError, match=r"no place for the mini suite .*: set LLAVA_MINI_CACHE to a folder"):
        suite.default_root()


def test_where_no_folder_can_be_made_the_variable_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAVA_MINI_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match=f"cannot be built in {tmp_path}/file/below .*: set LLAVA_MINI_CACHE anew"):
        suite.prepare()


def test_a_failed_build_leaves_nothing(monkeypatch, tmp_path):
    def build(folder: Path, group: str) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(suite, "_build", build)
    with pytest.raises(OSError, match="disk full"):
        suite.prepare(tmp_path / "suite")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_folder_with_something_else_is_left_alone(quick, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not the mini suite"):
        suite.prepare(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists() and not quick


def test_other_rows_than_those_on_record_are_refused(monkeypatch, tables, tmp_path):
    coco = tables["coco2017_cap_val"][0]
    changed = Table(coco.config, coco.split, coco.columns, [{**coco.rows[0], "id": 99}, *coco.rows[1:]], coco.prompts)
    monkeypatch.setattr(suite, "BUILDERS", {"coco2017_cap_val": lambda: [changed]})
    with pytest.raises(RuntimeError, match="COCO-Caption2017/default/val"):
        suite.prepare(tmp_path / "suite")
