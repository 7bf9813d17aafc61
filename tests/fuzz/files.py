"""Damage the files that users hand to the command line: each command must answer, or refuse in one line that names a file.

    python tests/fuzz/files.py --count 2000

Every case copies a folder of good files, damages one of them and runs one command in a process of its own. A case fails on a
signal, a hang, an exception that leaves the command, an error of several lines or without a file's name, and on files that a
refused command left half-written. Prints the failures, each with the number that `--first` repeats it by, and counts by outcome.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # import before the forks: optimizers import it, which takes seconds on a busy machine
from PIL import Image
from tqdm import tqdm

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig, cli
from pg_kernels.model.segmentation import MaskVQVAE
from pg_kernels.model.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import make_answer  # noqa: E402

SECONDS = 60
"""Seconds after which a command counts as hanging. The slowest undamaged command takes about one."""
MEMORY = 6 * 2**30
"""Address space in bytes beyond the parent's, so that a number in a damaged header cannot be allocated."""
LEAVES_EXCEPTION = 70
SIZE = (40, 30)
FORMATS = {"png": "RGB", "jpg": "RGB", "gif": "P", "bmp": "RGB", "tiff": "CMYK", "webp": "RGBA"}
SEGMENT = "<loc0000><loc0001><loc1022><loc1023>" + "".join(f"<seg{code:03d}>" for code in range(0, 128, 8)) + " fox"


@dataclass(frozen=True)
class Subject:
    """A file to damage, and a command that reads it. Paths are relative to the folder of good files."""

    file: str
    command: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        # All cases run in folders of one name: a training run resumes only with the files that it began with.
        good, folder = Path(temporary, "good"), Path(temporary, "case")
        subjects = write_good_files(folder)
        folder.rename(good)
        for subject in subjects if options.first == 0 else []:
            outcome, message = run_case(good, folder, subject, lambda path: None)
            if outcome != "answered":
                raise RuntimeError(f"{subject}: the undamaged files must be answered: {message}")
        for number in tqdm(range(options.first, options.first + options.count), unit="file", disable=None):
            rng = random.Random(number)
            subject = rng.choice(subjects)
            damage = rng.choice(damages(subject.file))
            outcome, message = run_case(good, folder, subject, partial(damage, rng=rng))
            outcomes[outcome] += 1
            if outcome not in ("answered", "refused"):
                name = damage.__name__
                print(
                    f"\n{number}: {outcome}: {name}({subject.file}), pg-kernels {' '.join(subject.command)}\n{message}"
                )
    print(
        f"{options.count} damaged files: "
        + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    )
    return int(any(outcome not in ("answered", "refused") for outcome in outcomes))


def run_case(good: Path, folder: Path, subject: Subject, damage: Callable[[Path], None]) -> tuple[str, str]:
    """Damage a copy of the good files and run the command on it. Return the outcome and the command's output."""
    shutil.copytree(good, folder)
    damage(folder / subject.file)
    before = set(folder.rglob("*"))
    said = folder.with_suffix(".stderr")
    child = os.fork()
    if child == 0:
        _run(folder, subject.command, said)
    status = os.waitpid(child, 0)[1]
    text = said.read_text(encoding="utf-8", errors="replace")
    half_written = [path for path in set(folder.rglob("*")) - before if path.name.startswith(".")]
    shutil.rmtree(folder)
    said.unlink()
    return _judge(status, text, subject, half_written), text


def _run(folder: Path, command: Sequence[str], said: Path) -> None:
    """Run the command, in the child process."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    code = LEAVES_EXCEPTION
    try:
        os.chdir(folder)
        code = cli.main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _judge(status: int, text: str, subject: Subject, half_written: Sequence[Path]) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"signal {-code}"
    if "Timeout (" in text:
        return "hang"
    if "Traceback" in text or code == LEAVES_EXCEPTION:
        return "exception"
    if code == 0:
        return "answered"
    errors = [line for line in text.splitlines() if "error: " in line]
    last = text.splitlines()[-1] if text else ""
    if len(errors) != 1 or not last.startswith("pg-kernels: error: "):
        return "several lines"
    folder = str(Path(subject.file).parent).strip(".")
    if half_written:
        return "half-written"
    # If an image's name is damaged, the error names the missing file.
    named = Path(subject.file).name in last or (folder and folder in last) or "no such image file" in last
    return "refused" if named else "no file named"


# Damages


def damages(file: str) -> list[Callable[..., None]]:
    """Return the possible damages of a file of this kind. All are random, and rewrite the file."""
    kind = Path(file).suffix
    own: dict[str, list[Callable[..., None]]] = {
        ".json": [change_json, change_json, change_json],
        ".jsonl": [change_line, change_line, change_line],
        ".safetensors": [change_header, change_header],
        ".npz": [change_array, change_array],
    }
    return [change_bytes, cut, fill, *own.get(kind, [])]


def change_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 64))):
        content[rng.randrange(min(len(content), rng.choice((64, 4096, 2**62))))] = rng.randrange(256)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice((0, 1, 8, rng.randrange(len(content)), len(content) - 1))])


def fill(path: Path, rng: random.Random) -> None:
    """Replace some or all of the file by zeros, random bytes, text or a Git LFS pointer."""
    content = path.read_bytes()
    start, end = rng.choice(((0, len(content)), tuple(sorted(rng.randrange(len(content) + 1) for _ in range(2)))))
    size = end - start
    other = rng.choice(
        (bytes(size), rng.randbytes(min(size, 4096)), b"{}", b"version https://git-lfs.github.com/spec/v1\n")
    )
    path.write_bytes(content[:start] + other + content[end:])


def odd_value(rng: random.Random) -> Any:
    """Return an unexpected JSON value."""
    nested: Any = []
    for _ in range(rng.choice((1, 500))):
        nested = [nested]
    numbers = (0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, 1e308, float("inf"), float("nan"))
    texts = ("", "x", "\ud800", "\0", "1", "../../x", "<loc0000>", "9" * 5000)
    containers = ({}, {"x": None}, [None], ["x", 1], [0, 0, 0, 0], [1e9] * 4, [float("nan")] * 4, nested)
    return rng.choice((rng.choice((None, True, False)), rng.choice(numbers), rng.choice(texts), rng.choice(containers)))


def change_value(content: Any, rng: random.Random) -> Any:
    """Return the JSON value with an odd value somewhere in it, or without some key."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.9:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if rng.random() < 0.1:
            del content[key]
        else:
            content[key] = change_value(content[key], rng)
        return content
    return odd_value(rng)


def _dump(content: Any) -> str:
    return json.dumps(content)


def change_json(path: Path, rng: random.Random) -> None:
    path.write_text(_dump(change_value(json.loads(path.read_text(encoding="utf-8")), rng)), encoding="utf-8")


def change_line(path: Path, rng: random.Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _dump(change_value(json.loads(lines[number]), rng))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_header(path: Path, rng: random.Random) -> None:
    """Change the JSON header of a safetensors file, and its length to match."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = _dump(change_value(json.loads(content[8:end]), rng)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def change_array(path: Path, rng: random.Random) -> None:
    """Write an .npz file with one array replaced, renamed, or left out."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    others = (array[..., None], array[:1], array.astype(np.complex64), array.astype(str), np.float32(1), array[:0])
    kind = rng.choice(("other", "other", "renamed", "missing", "pickled", "header"))
    if kind == "other":
        arrays[name] = rng.choice(others)
    elif kind == "renamed":
        arrays[rng.choice(("x", "params/x", "../x", name + "/w", ""))] = array
    elif kind == "pickled":
        arrays[name] = np.array([{"x": 1}], dtype=object)
    np.savez(path, **arrays)
    if kind == "header":
        with zipfile.ZipFile(path, "a") as archive:
            stream = io.BytesIO()
            shape = rng.choice(((2**40,), (2**62, 2**62), (-1,), (3,)))
            np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", stream.getvalue() + bytes(4))


# Good files


def write_good_files(folder: Path) -> list[Subject]:
    """Write one good file of every kind, and return them with the commands that read them."""
    folder.mkdir()
    tokenizer = Tokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    model = _answering(SEGMENT, tokenizer)
    processor = Processor(
        tokenizer,
        image_size=28,
        num_image_tokens=4,
        mask_decoder=MaskVQVAE.from_file(EMBEDDED_CHECKPOINT / "vae-oid.npz"),
    )
    for name, shard_bytes in (("checkpoint", 5e9), ("sharded", 3e5)):
        model.save_pretrained(folder / name, max_shard_bytes=shard_bytes)
        processor.save_pretrained(folder / name)
        shutil.copy(EMBEDDED_CHECKPOINT / "vae-oid.npz", folder / name)
    PaliGemma.from_pretrained(folder / "checkpoint", quantize="int8").save_pretrained(folder / "int8")
    processor.save_pretrained(folder / "int8")
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.config = PaliGemmaConfig(model.config.vision_config, model.config.text_config, tokenizer.image_token_id)
    model.save_big_vision(folder / "big_vision.npz")
    (folder / "checkpoint/added_tokens.json").write_text(_dump({"<image>": tokenizer.image_token_id}))
    (folder / "checkpoint/special_tokens_map.json").write_text(_dump({"eos_token": "<eos>"}))
    for ending, mode in FORMATS.items():
        Image.effect_noise(SIZE, 50).convert("RGB").convert(mode).save(folder / f"photo.{ending}")
    lines = [
        {"image": f"photo.{ending}", "prefix": "what", "suffix": ["fox", "Fox"]} for ending in ("png", "jpg", "gif")
    ]
    _write(folder / "lines.jsonl", lines)
    return [*_model_subjects(), *_training_subjects(folder), *_evaluation_subjects(folder)]


def _answering(answer: str, tokenizer: Tokenizer) -> PaliGemma:
    """Return a minimal model that always gives one answer."""
    config = PaliGemmaConfig(
        vision_config=VisionConfig(16, 16, 1, 2, image_size=28),
        text_config=TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=128,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = PaliGemma(config)
    make_answer(model, tokenizer, answer)
    return model


def _model_subjects() -> list[Subject]:
    run = ("run", "photo.png", "segment fox", "--max-new-tokens", "24", "--checkpoint")
    subjects = [
        Subject(f"checkpoint/{name}", (*run, "checkpoint"))
        for name in (
            *("config.json", "config.json", "model.safetensors", "generation_config.json", "tokenizer.model"),
            *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "preprocessor_config.json"),
            "vae-oid.npz",
        )
    ]
    subjects += [Subject(f"int8/{name}", (*run, "int8")) for name in ("config.json", "model.safetensors")]
    index = "sharded/model.safetensors.index.json"
    subjects += [Subject(index, (*run, "sharded")), Subject(index, ("convert", "sharded", "new"))]
    subjects += [Subject("checkpoint/config.json", ("convert", "checkpoint", "new"))]
    npz = (*run, "big_vision.npz", "--tokenizer", "checkpoint/tokenizer.model")
    subjects += [Subject("big_vision.npz", npz), Subject("big_vision.npz", ("convert", "big_vision.npz", "new"))]
    for ending in FORMATS:
        command = ("run", f"photo.{ending}", "detect fox", "--max-new-tokens", "2", "--checkpoint", "checkpoint")
        subjects.append(Subject(f"photo.{ending}", command))
    return subjects


def _training_subjects(folder: Path) -> list[Subject]:
    train = ("finetune", "--data", "lines.jsonl", "--checkpoint", "checkpoint", "--workers", "0", "--batch-size", "2")
    steps = (*train, "--eval-data", "lines.jsonl", "--output", "run", "--steps", "2", "--save-every", "1")
    new = (*train, "--output", "new", "--steps", "1")
    # A run that was stopped after its first step. It needs a process of its own for its handlers and threads.
    child = os.fork()
    if child == 0:
        from pg_kernels.model.training.state import State

        save = State.save

        def save_and_die(state: Any) -> None:
            save(state)
            os._exit(0)

        State.save = save_and_die  # type: ignore[method-assign]
        os.chdir(folder)
        os._exit(cli.main(steps))
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the undamaged training run failed")
    return [
        Subject("lines.jsonl", new),
        Subject("photo.png", new),
        Subject("photo.gif", new),
        Subject("checkpoint/tokenizer_config.json", new),
        Subject("run/checkpoint.safetensors", steps),
        Subject("run/log.jsonl", steps),
    ]


def _evaluation_subjects(folder: Path) -> list[Subject]:
    box, rle = [4, 3, 20, 12], {"size": [SIZE[1], SIZE[0]], "counts": [600, 600]}
    ask = {"question": "which?", "image_id": 7, "question_id": 1, "answers": ["a"] * 3}
    image = {"id": 7, "file_name": "photo.png", "width": SIZE[0], "height": SIZE[1], "caption": "the fox"}
    object_ = {"id": 1, "image_id": 7, "iscrowd": 0, "category_id": 3, "bbox": box, "caption": "a fox"}
    coco: dict[str, Any] = {
        "images": [image],
        "categories": [{"id": 3, "name": "fox"}],
        "annotations": [object_ | {"segmentation": rle}, object_ | {"id": 2, "segmentation": [[1, 1, 9, 1, 9, 9]]}],
    }
    document = {"questionId": 1, "question": "which?", "answers": ["a"]}
    files = {
        "caption": coco,
        "detect": coco,
        "refer": coco | {"annotations": coco["annotations"][:1]},
        "segment": coco,
        "vqa": {"data": [ask | {"image_id": "photo"}]},
        "gqa": {"1": {"question": "Is it?", "imageId": "photo", "answer": "no"}},
        "docvqa": {"data": [document | {"image": "photo.png"}]},
        "infovqa": {"data": [document | {"image_local_name": "photo.png"}]},
        "stvqa": {"data": [document | {"question_id": 1, "file_path": "photo.png"}]},
        "chartqa": [{"imgname": "photo.png", "query": "how much?", "label": "20"}],
    }
    lines = {
        "jsonl": [{"image": "photo.png", "prefix": "what is it?", "suffix": ["fox"]}],
        "ocr": [{"image": "photo.png", "suffix": "fox"}],
        "pope": [{"question_id": 1, "image": "photo.png", "text": "Is there a fox?", "label": "yes"}],
    }
    shutil.copy(folder / "photo.jpg", folder / "1.jpg")
    for name in ("gqa", "vqa"):
        shutil.copy(folder / "photo.jpg", folder / f"{name}.jpg")
    (folder / "mmvp.csv").write_text(
        "Index,Question,Options,Correct Answer\n1,Which?,(a) Fox (b) Owl,(a)\n2,Which?,(a) Fox (b) Owl,(b)\n"
    )
    shutil.copy(folder / "photo.jpg", folder / "2.jpg")
    names = {"mmvp": "mmvp.csv"}
    for task, content in (files | lines).items():
        names[task] = f"{task}.jsonl" if task in lines else f"{task}.json"
        _write(folder / names[task], content)
    subjects = []
    for task, name in names.items():
        options = ("--max-new-tokens", "24", "--checkpoint", "checkpoint", "--output", "predictions.jsonl")
        subjects.append(Subject(name, ("evaluate", "--task", task, "--data", f"{name}", *options)))
    return subjects


def _write(path: Path, content: Any) -> None:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(_dump(line) + "\n" for line in content) if lines else _dump(content), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
