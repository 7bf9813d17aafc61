"""The tasks of `pg-kernels evaluate`: their data sets and metrics. This module does not import torch."""

ABOUT = {
    "caption": "COCO captions, XM3600, COCO-35L: CIDEr, BLEU-4",
    "vqa": "VQAv2, OK-VQA, TextVQA: VQA accuracy",
    "gqa": "GQA: exact match",
    "docvqa": "DocVQA: ANLS",
    "infovqa": "InfographicVQA: ANLS",
    "stvqa": "ST-VQA: ANLS",
    "chartqa": "ChartQA: relaxed accuracy",
    "ocr": "JSON lines with texts: exact match, character error rate",
    "detect": "COCO instances: average precision of boxes",
    "refer": "RefCOCO in COCO's format: mean IoU of masks, precision of boxes",
    "segment": "COCO instances: mean IoU of masks",
    "mmvp": "MMVP: accuracy of pairs",
    "pope": "POPE: accuracy, precision, recall, F1, share of yes",
    "jsonl": "JSON lines of image, prefix, suffix: exact match",
}
