"""The metrics, compared with values worked out by hand from their definitions."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from pg_kernels.model.evaluation.metrics import (
    anls,
    average_precision,
    box_accuracy,
    box_iou,
    caption_scores,
    character_error_rate,
    chosen_option,
    exact_match,
    mask_iou,
    mean_iou,
    normalize_vqa_answer,
    pair_accuracy,
    relaxed_accuracy,
    tokenize_caption,
    vqa_accuracy,
    yes_no_scores,
)
from pg_kernels.model.locations import Detection


def test_exact_match() -> None:
    assert exact_match(["cat", " cat\n", "Cat", ""], [["cat"], ["dog", "cat"], ["cat"], ["cat"]]) == {
        "exact_match": 0.5
    }


def test_character_error_rate_is_over_all_characters_and_may_exceed_one() -> None:
    # kitten → sitting: 3 edits; "" → "abc": 3; an exact answer: 0.
    scores = character_error_rate(["kitten", "", "four"], [["sitting"], ["abc"], ["four"]])
    assert scores == {"character_error_rate": 6 / 14}
    assert character_error_rate(["abcd"], [["a"]]) == {"character_error_rate": 3.0}
    assert character_error_rate(["ab"], [["xyz", "abc"]]) == {"character_error_rate": 1 / 3}
    with pytest.raises(ValueError, match="no character"):
        character_error_rate(["a"], [[" "]])


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Coca Cola", ["coca cola"], 1.0),
        ("abcx", ["abcd"], 0.75),
        ("abcx", ["zzzz", "abcd"], 0.75),  # the best of several references
        ("abxy", ["abcd"], 0.0),  # half is wrong: not below the threshold
        ("abxyz", ["abcde"], 0.0),
        ("abcyz", ["abcde"], 0.6),
        ("abcd efgh", ["abcd"], 0.0),  # divided by the length of the longer one
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(answer: str, accepted: list[str], score: float) -> None:
    assert anls([answer], [accepted]) == {"anls": pytest.approx(score)}


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-100", "100", False),
        ("-96", "-100", True),
        ("10.4%", "10%", True),
        ("0.102", "10%", True),  # a percentage is a fraction
        ("10", "10%", False),
        ("0", "0", True),
        ("0.0", "0", False),  # 5 % of a reference of 0 is 0
        ("0.01", "0", False),
        ("Yes", "yes", True),
        ("blue", "light blue", False),
        ("1,000", "1000", False),  # not a number, as in the original
        ("2014", "[2013, 2014]", False),
        ("", "3", False),
        ("nan", "5", False),
        ("inf", "inf", True),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, right: bool) -> None:
    assert relaxed_accuracy([answer], [[reference]]) == {"relaxed_accuracy": float(right)}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cats!", "cats"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("an apple, a pear", "apple pear"),
        ("black/white", "black white"),  # punctuation between letters separates them
        ("black /white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt, 1,000", "tshirt 1000"),  # punctuation beside a number with a comma does not
        ("3.5", "3.5"),
        ("mr. smith.", "mr smith"),
        ("it's", "it's"),
        ("A", ""),
    ],
)
def test_vqa_normalisation(text: str, normal: str) -> None:
    assert normalize_vqa_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "people", "score"),
    [
        ("yes", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),  # nothing is normalised if all agree
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1.0),
        ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("yes", ["yes"] * 2 + ["no"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("yes", ["yes"] * 1 + ["no"] * 9, (1 * 0 + 9 * 1 / 3) / 10),
        ("two", ["2"] * 5 + ["two"] * 4 + ["3"], 1.0),
        ("", ["yes"] * 9 + ["no"], 0.0),
        ("red", ["red"], 1.0),
    ],
)
def test_vqa_accuracy(answer: str, people: list[str], score: float) -> None:
    assert vqa_accuracy([answer], [people]) == {"accuracy": pytest.approx(score)}


CAPTIONS = [["a black cat sits on the mat"], ["two dogs run along the beach"], ["an old red bus in the street"]]


def test_perfect_captions_score_ten() -> None:
    assert caption_scores([captions[0] for captions in CAPTIONS], CAPTIONS) == {
        "cider": pytest.approx(10.0),
        "bleu4": pytest.approx(1.0),
    }


def test_cider_by_hand() -> None:
    """One wrong caption of two words: tf-idf vectors of n-grams, whose cosines are averaged over n = 1 to 4."""
    # "red cat" for "red dog"; no word of it is in the other caption, so idf = log 2 wherever the reference has the word.
    # n = 1: "red" is in one image's references, "cat" in none, which counts as one: (1·1)/(√2·√2) = 1/2. n = 2: 0. n > 2: 0.
    scores = caption_scores(["red cat", "blue bird"], [["red dog"], ["blue bird"]])
    first, second = 10 * (1 / 2) / 4, 10 * (1 + 1) / 4
    assert scores["cider"] == pytest.approx((first + second) / 2)
    assert caption_scores(["", ""], [["red dog"], ["blue bird"]]) == {"cider": 0.0, "bleu4": pytest.approx(0.0)}


def test_bleu_by_hand() -> None:
    # 5, 3, 2 and 1 of the answer's 6, 5, 4 and 3 n-grams are in a reference. It is as long as the nearest reference.
    answer, references = "a b c d x f", ["a b c d e f", "g h"]
    assert caption_scores([answer, answer], [references, references])["bleu4"] == pytest.approx(
        (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=1e-5
    )


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A well-made cat, sitting.", "a well-made cat sitting"),
        ("The dog’s bowl isn't 'full' -- it's 2,000.5 grams!", "the dog 's bowl is n't full it 's 2,000.5 grams"),
        ("black/white (new)", "black white new"),
        ("两只猫。", "两 只 猫"),
        ("हिन्दी में लिखा।", "हिन्दी में लिखा"),  # vowel signs belong to words
        ("...", ""),
    ],
)
def test_words_of_captions(caption: str, words: str) -> None:
    assert tokenize_caption(caption) == words


CAT, DOG = Detection("cat", (10, 10, 50, 50)), Detection("dog", (60, 60, 90, 90))
ELSEWHERE = Detection("cat", (100, 100, 140, 140))


def test_perfect_detections() -> None:
    objects = [[CAT, DOG], [CAT], []]
    assert average_precision(objects, objects) == {
        "ap": pytest.approx(1.0),
        "ap50": pytest.approx(1.0),
        "ap75": pytest.approx(1.0),
    }


def test_a_missing_box_costs_recall() -> None:
    # Half of the cats found, none wrongly: precision 1 at 51 of the 101 recalls 0, 0.01 … 1. The dog is found.
    assert average_precision([[CAT, DOG], []], [[CAT, DOG], [CAT]])["ap50"] == pytest.approx((51 / 101 + 1) / 2)


def test_a_wrong_box_costs_more_the_surer_it_is() -> None:
    wanted = [[CAT]]
    assert average_precision([[CAT, ELSEWHERE]], wanted, scores=[[0.9, 0.5]])["ap50"] == pytest.approx(1.0)
    assert average_precision([[CAT, ELSEWHERE]], wanted, scores=[[0.5, 0.9]])["ap50"] == pytest.approx(0.5)
    # The order decides between equal answers.
    assert average_precision([[ELSEWHERE, CAT]], wanted)["ap50"] == pytest.approx(0.5)
    assert average_precision([[CAT, CAT]], [[CAT], [CAT]][:1], scores=[[0.9, 0.8]])["ap50"] == pytest.approx(1.0)


def test_box_overlap_decides_up_to_which_threshold() -> None:
    # 40 × 40 of 50 × 40: IoU 0.8, at or above the thresholds 0.5 to 0.8, seven of ten.
    scores = average_precision([[Detection("cat", (10, 10, 60, 50))]], [[CAT]])
    assert scores == {"ap": pytest.approx(0.7), "ap50": pytest.approx(1.0), "ap75": pytest.approx(1.0)}


def test_crowds_need_not_be_found_and_labels_without_reference_do_not_count() -> None:
    crowd = Detection("cat", (100, 100, 200, 200))
    found = [[CAT, ELSEWHERE, Detection("unicorn", (0, 0, 5, 5))]]
    assert average_precision(found, [[CAT, crowd]], crowds=[[False, True]])["ap50"] == pytest.approx(1.0)
    assert average_precision([[CAT]], [[CAT, crowd]], crowds=[[False, True]])["ap50"] == pytest.approx(1.0)
    assert average_precision(found, [[CAT]], scores=[[0.1, 0.9, 0.9]])["ap50"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="crowd"):
        average_precision(found, [[crowd]], crowds=[[True]])


def test_no_detections_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert average_precision([[], []], [[CAT], [DOG]]) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    assert capsys.readouterr().out == ""


def test_mean_iou() -> None:
    left, right, both = (np.zeros((4, 4), bool) for _ in range(3))
    left[:, :2] = right[:, 2:] = both[:] = True
    empty = np.zeros((4, 4), bool)
    assert mask_iou(left, both) == 0.5 and mask_iou(left, right) == 0.0 and mask_iou(empty, empty) == 0.0
    scores = mean_iou(iter([left, left, None, both]), iter([left, both, left, left]))
    assert scores == {"mean_iou": pytest.approx((1 + 0.5 + 0 + 0.5) / 4), "missing": 0.25}
    with pytest.raises(ValueError, match="shape"):
        mask_iou(left, left[:2])
    with pytest.raises(ValueError, match="none given"):
        mean_iou([], [])


def test_box_accuracy() -> None:
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    assert box_iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0.0 and box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    wanted = (0.0, 0.0, 10.0, 10.0)
    boxes = [wanted, (0.0, 0.0, 5.0, 10.0), (0.0, 0.0, 4.9, 10.0), None]
    assert box_accuracy(boxes, [wanted] * 4) == {"precision@0.5": 0.5}


def test_pair_accuracy() -> None:
    assert pair_accuracy([True, True, True, False, False, False]) == {"pair_accuracy": 1 / 3, "accuracy": 0.5}
    with pytest.raises(ValueError, match="even"):
        pair_accuracy([True])


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("(b)", 1),
        ("B", 1),
        ("B.", 1),
        ("b. closed", 1),
        ("a) ", 0),
        ("(a) open", 0),
        ("closed", 1),
        ("Closed.", 1),
        ("the snow", 2),
        ("on", None),  # "On the snow" and "On a surface" share the word
        ("zebra", None),
        ("z", None),
        ("", None),
    ],
)
def test_chosen_option(answer: str, option: int | None) -> None:
    assert chosen_option(answer, ["Open", "Closed", "On the snow", "On a surface"]) == option


def test_yes_no_scores() -> None:
    answers = ["yes", "Yes, there is.", "no", "There is not. Yes", "", "not sure, yes"]
    labels = ["yes", "no", "no", "yes", "no", "yes"]
    # Answered yes: 0, 1, 4. One of them is right. One of the three positives is found.
    assert yes_no_scores(answers, labels) == {
        "accuracy": 2 / 6,
        "precision": 1 / 3,
        "recall": 1 / 3,
        "f1": pytest.approx(1 / 3),
        "yes_ratio": 3 / 6,
        "valid": 2 / 6,
    }
    never = yes_no_scores(["no", "no"], ["yes", "no"])
    assert (never["precision"], never["recall"], never["f1"]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"references\[0\]"):
        yes_no_scores(["yes"], ["Yes"])


@pytest.mark.parametrize(
    "metric", [exact_match, anls, relaxed_accuracy, vqa_accuracy, caption_scores, character_error_rate]
)
def test_bad_arguments(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="none given"):
        metric([], [])
    with pytest.raises(ValueError, match="1 for 2 predictions"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\]: expected a list .* got 'cat'"):
        metric(["a", "b"], [["a"], "cat"])
    with pytest.raises(ValueError, match=r"references\[0\]: expected a list .* got \[\]"):
        metric(["a"], [[]])


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(RuntimeError, match="`rapidfuzz`.*`evaluate` extra"):
        anls(["a"], [["a"]])


def test_scores_are_plain_numbers() -> None:
    """Scores survive a round trip through JSON."""
    scores = caption_scores(["red cat", "blue bird"], [["red dog"], ["blue bird"]]) | average_precision(
        [[CAT]], [[CAT]]
    )
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())
