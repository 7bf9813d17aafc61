"""The standard metrics of PaliGemma's tasks. They map predictions and references to a dictionary of numbers.

Scores are fractions: 1.0 is perfect, and papers print 100 times the fraction. Answers are compared without outer white space.
Every function raises ValueError if there is nothing to score or predictions and references differ in number, and RuntimeError if
a package that it needs is not installed.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from types import ModuleType

import numpy as np

from ..locations import Box, Detection


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of answers that equal an accepted answer, case included."""
    _check_answers(predictions, references)
    right = (answer.strip() in _stripped(accepted) for answer, accepted in zip(predictions, references))
    return {"exact_match": _mean(right)}


def character_error_rate(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the Levenshtein edits from answers to references over the references' characters; 0 is perfect, above 1 possible.

    The nearest of several accepted answers counts. Raises ValueError if the references are empty.
    """
    _check_answers(predictions, references)
    edits = characters = 0
    for answer, accepted in zip(predictions, references):
        distance, length = min((_edits(answer.strip(), text), len(text)) for text in _stripped(accepted))
        edits, characters = edits + distance, characters + length
    if not characters:
        raise ValueError("references: they hold no character to compare with")
    return {"character_error_rate": edits / characters}


def anls(predictions: Sequence[str], references: Sequence[Sequence[str]], threshold: float = 0.5) -> dict[str, float]:
    """Return the average normalised Levenshtein similarity of DocVQA, InfographicVQA and ST-VQA, ignoring case.

    With d the edits divided by the length of the longer text, an answer scores 1 − d if d is below `threshold`, else 0. The best
    accepted answer counts. Source: Biten et al., https://arxiv.org/abs/1905.13648, equation 1.
    """
    _check_answers(predictions, references)

    def similarity(answer: str, accepted: str) -> float:
        distance = _edits(answer, accepted) / max(len(answer), len(accepted), 1)
        return 1 - distance if distance < threshold else 0.0

    scores = (
        max(similarity(_plain(answer), _plain(text)) for text in accepted)
        for answer, accepted in zip(predictions, references)
    )
    return {"anls": _mean(scores)}


def relaxed_accuracy(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tolerance: float = 0.05
) -> dict[str, float]:
    """Return ChartQA's accuracy: numbers may be off by `tolerance` of the reference, other answers must be equal, ignoring case.

    "12%" is the number 0.12. A reference of 0 is compared as text. Source: Masry et al., https://arxiv.org/abs/2203.10244,
    section 5.1, as big_vision's evaluator implements it.
    """
    _check_answers(predictions, references)

    def right(answer: str, reference: str) -> bool:
        given, wanted = _number(answer), _number(reference)
        if given is not None and wanted:
            return answer == reference or abs(given - wanted) <= tolerance * abs(wanted)
        return answer == reference

    scores = (
        any(right(_plain(answer), _plain(text)) for text in accepted)
        for answer, accepted in zip(predictions, references)
    )
    return {"relaxed_accuracy": _mean(scores)}


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return VQAv2's accuracy: an answer scores min(matching people / 3, 1), averaged over leaving out each person.

    `references` holds all people's answers to each question, ten in VQAv2 and TextVQA. Where people disagree, all answers are
    normalised first (`normalize_vqa_answer`). Source: https://visualqa.org/evaluation.html and its evaluation tool, as
    big_vision's evaluator implements it.
    """
    _check_answers(predictions, references)

    def accuracy(answer: str, people: Sequence[str]) -> float:
        answer, people = _on_one_line(answer), [_on_one_line(text) for text in people]
        if len(set(people)) > 1:
            answer, people = normalize_vqa_answer(answer), [normalize_vqa_answer(text) for text in people]
        same = people.count(answer)
        if len(people) == 1:  # nobody is left without the only one
            return float(same)
        return sum(min((same - (text == answer)) / 3, 1.0) for text in people) / len(people)

    return {"accuracy": _mean(accuracy(answer, people) for answer, people in zip(predictions, references))}


def normalize_vqa_answer(text: str) -> str:
    """Normalise an answer as VQAv2 does: no punctuation and articles, lower case, digits for number words, apostrophes."""
    # The official tool removes other punctuation instead of replacing it if the text has a comma within a number. Keep this.
    comma_in_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _VQA_PUNCTUATION:
        joins = comma_in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if joins else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_VQA_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return CIDEr (at most 10, and 0 on a single image) and BLEU-4 over all captions, by COCO's own scorers.

    `tokenize_caption` splits words. Sources: Vedantam et al., https://arxiv.org/abs/1411.5726; Papineni et al., 2002;
    the package pycocoevalcap.
    """
    _check_answers(predictions, references)
    given = {i: [tokenize_caption(caption)] for i, caption in enumerate(predictions)}
    wanted = {i: [tokenize_caption(caption) for caption in captions] for i, captions in enumerate(references)}
    if not any(caption for captions in wanted.values() for caption in captions):
        raise ValueError("references: they hold no word to compare with")
    cider, _ = _package("pycocoevalcap.cider.cider").Cider().compute_score(wanted, given)
    bleu, _ = _package("pycocoevalcap.bleu.bleu").Bleu(4).compute_score(wanted, given, verbose=0)
    return {"cider": float(cider), "bleu4": float(bleu[3])}


def tokenize_caption(text: str) -> str:
    """Return a caption's words, separated by spaces. This rule for all languages replaces COCO's Java program for English.

    Text becomes lower case. Punctuation and symbols are removed, except within words (well-made) and numbers (2,000.5). English
    clitics are words, as in the Penn Treebank (do n't, dog 's), and so is every character of a script without spaces.
    """
    text = text.lower().replace("’", "'")
    text = "".join(c if c in "'-.,:" or unicodedata.category(c)[0] not in "PS" else " " for c in text)
    text = re.sub(r"(?<!\d)[.,:]|[.,:](?!\d)|(?<!\w)['-]|['-](?!\w)", " ", text)
    text = re.sub(r"(n't|'(?:s|m|d|re|ve|ll))(?!\w)", r" \1", text)
    text = re.sub(f"([{_WITHOUT_SPACES}])", r" \1 ", text)
    return " ".join(text.split())


def average_precision(
    predictions: Sequence[Sequence[Detection]],
    references: Sequence[Sequence[Detection]],
    *,
    scores: Sequence[Sequence[float]] | None = None,
    crowds: Sequence[Sequence[bool]] | None = None,
) -> dict[str, float]:
    """Return COCO's average precision of boxes: the mean over IoU thresholds from 0.5 to 0.95 (`ap`), at 0.5 and at 0.75.

    Args:
        predictions: each image's objects, in pixels. Objects whose label no reference has are ignored.
        references: each image's objects.
        scores: the confidence of each prediction; without scores the given order decides.
        crowds: which references are crowds, which match any number of predictions and need none.

    Raises ValueError, too, if all references are crowds. Source: https://cocodataset.org/#detection-eval; pycocotools.
    """
    _check(predictions, references)
    labels = sorted({found.label for image in references for found in image})
    categories = {label: number for number, label in enumerate(labels, 1)}
    wanted: list[dict[str, object]] = []
    given: list[dict[str, object]] = []
    for i, (image, objects) in enumerate(zip(references, predictions)):
        for j, thing in enumerate(image):
            entry = _coco_entry(len(wanted), i, categories[thing.label], thing.box)
            wanted.append({**entry, "iscrowd": int(crowds is not None and crowds[i][j])})
        for j, thing in enumerate(objects):
            if thing.label in categories:
                entry = _coco_entry(len(given), i, categories[thing.label], thing.box)
                given.append({**entry, "score": 1.0 if scores is None else scores[i][j]})
    if all(entry["iscrowd"] for entry in wanted):
        raise ValueError("references: they hold no object that is not a crowd")
    coco, cocoeval = _package("pycocotools.coco"), _package("pycocotools.cocoeval")

    def indexed(entries: list[dict[str, object]]) -> object:
        index = coco.COCO()
        index.dataset = {
            "images": [{"id": i} for i in range(len(references))],
            "categories": [{"id": number, "name": label} for label, number in categories.items()],
            "annotations": entries,
        }
        index.createIndex()
        return index

    with redirect_stdout(io.StringIO()):  # it reports its progress
        evaluation = cocoeval.COCOeval(indexed(wanted), indexed(given), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval[
        "precision"
    ]  # [thresholds, recalls, categories, 1, 1], −1 for categories of crowds alone
    precision = precision[:, :, (precision > -1).all((0, 1, 3, 4))]
    return {"ap": float(precision.mean()), "ap50": float(precision[0].mean()), "ap75": float(precision[5].mean())}


def mean_iou(predictions: Iterable[np.ndarray | None], references: Iterable[np.ndarray]) -> dict[str, float]:
    """Return the mean intersection over union of pairs of masks, bool [H, W]. A missing prediction (None) counts 0.

    `missing` is the share of missing predictions. Iterators are accepted, so that masks need not be in memory together. Source:
    big_vision's segmentation evaluator.
    """
    overlaps, missing = [], 0
    for predicted, wanted in zip(predictions, references, strict=True):
        missing += predicted is None
        overlaps.append(0.0 if predicted is None else mask_iou(predicted, wanted))
    if not overlaps:
        raise ValueError("predictions: none given; at least one is needed")
    return {"mean_iou": float(np.mean(overlaps)), "missing": missing / len(overlaps)}


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two masks, bool [H, W]; 0 if both are empty."""
    if a.shape != b.shape:
        raise ValueError(f"masks: expected the same shape, got {a.shape} and {b.shape}")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def box_accuracy(
    predictions: Sequence[Box | None], references: Sequence[Box], threshold: float = 0.5
) -> dict[str, float]:
    """Return the share of predicted boxes whose intersection over union with the reference reaches `threshold`. None counts 0."""
    _check(predictions, references)
    found = (box is not None and box_iou(box, wanted) >= threshold for box, wanted in zip(predictions, references))
    return {f"precision@{threshold:g}": _mean(found)}


def box_iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2); 0 if they are disjoint or have no area."""
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if shared > 0 else 0.0


def pair_accuracy(right: Sequence[bool]) -> dict[str, float]:
    """Return MMVP's accuracy: the share of pairs of questions (0 and 1, 2 and 3, …) with both answers right.

    Source: Tong et al., https://arxiv.org/abs/2401.06209.
    """
    if not right or len(right) % 2:
        raise ValueError(f"right: expected an even number of answers, two for each pair, got {len(right)}")
    return {"pair_accuracy": _mean(a and b for a, b in zip(right[::2], right[1::2])), "accuracy": _mean(right)}


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the option of a multiple choice that an answer means, or None if it is ambiguous.

    This is the option with the answer's letter ("b", "b.", "(b)", "(b) closed"), else the only option that shares most words with
    the answer.
    """
    letter = re.match(r"\(([a-z])\)|([a-z])(?:$|[.):])", answer.strip().lower())
    if letter is not None:
        index = ord(letter[1] or letter[2]) - ord("a")
        return index if index < len(options) else None
    words = set(normalize_vqa_answer(answer).split())
    shares = []
    for option in options:
        others = set(normalize_vqa_answer(option).split())
        shares.append(len(words & others) / max(len(words | others), 1))
    best = max(shares, default=0.0)
    return shares.index(best) if best > 0 and shares.count(best) == 1 else None


def yes_no_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return POPE's scores, with "yes" as the positive answer.

    An answer means no if its first sentence has the word "no" or "not", and yes otherwise, even if it is empty: `valid` is the
    share that is "yes" or "no" and nothing else. Precision, recall and F1 are 0 where they would be 0 / 0.

    Raises ValueError, too, for a reference that is neither. Source: Li et al., https://arxiv.org/abs/2305.10355, and their
    evaluation; `valid` as in big_vision's.
    """
    _check(predictions, references)
    for index, reference in enumerate(references):
        if reference not in ("yes", "no"):
            raise ValueError(f"references[{index}]: expected 'yes' or 'no', got {reference!r}")
    answers = [_plain(answer) for answer in predictions]
    said_yes = [not {"no", "not"} & set(answer.split(".")[0].replace(",", "").split()) for answer in answers]
    is_yes = [reference == "yes" for reference in references]
    hits = sum(said and true for said, true in zip(said_yes, is_yes))
    precision, recall = hits / max(sum(said_yes), 1), hits / max(sum(is_yes), 1)
    return {
        "accuracy": _mean(said == true for said, true in zip(said_yes, is_yes)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": _mean(said_yes),
        "valid": _mean(answer in ("yes", "no") for answer in answers),
    }


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_VQA_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def _without_one_apostrophe(words: str) -> dict[str, str]:
    """Contractions by their spelling without an apostrophe, which VQAv2 corrects."""
    return {word[:i] + word[i + 1 :]: word for word in words.split() for i, letter in enumerate(word) if letter == "'"}


_VQA_CONTRACTIONS = _without_one_apostrophe(
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
) | {"somebody'd": "somebodyd"}  # the official tool's own slip

# Thai, Lao, Myanmar, Khmer; kana; Han.
_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


def _check(predictions: Sequence[object], references: Sequence[object]) -> None:
    if not predictions:
        raise ValueError("predictions: none given; at least one is needed")
    if len(predictions) != len(references):
        raise ValueError(f"references: {len(references)} for {len(predictions)} predictions; each needs its own")


def _check_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _check(predictions, references)
    for index, accepted in enumerate(references):
        if isinstance(accepted, str) or not accepted:
            raise ValueError(f"references[{index}]: expected a list of at least one answer, got {accepted!r}")


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return float(sum(numbers) / len(numbers))


def _stripped(texts: Iterable[str]) -> list[str]:
    return [text.strip() for text in texts]


def _plain(text: str) -> str:
    return text.strip().lower()


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def _edits(a: str, b: str) -> int:
    return _package("rapidfuzz.distance").Levenshtein.distance(a, b)


def _coco_entry(position: int, image: int, category: int, box: Box) -> dict[str, object]:
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    # pycocotools takes the id 0 for no match.
    return {
        "id": position + 1,
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, width, height],
        "area": width * height,
    }


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise RuntimeError(
            f"this metric needs the package `{package}`: install this package's `evaluate` extra"
        ) from error
