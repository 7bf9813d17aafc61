from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import tanh


@triton.jit
def forward(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    lse_ptr,
    sum_ptr,
    picked_ptr,
    tokens,
    vocabulary,
    words_per_split,
    inner,
    hidden_stride,
    weight_stride,
    softcap,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Over one split of the vocabulary: the logits' log-sum-exp, (with sum_ptr) their sum, and the label's logit if there."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + token, mask=token < tokens, other=-1)
    highest = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    plain = tl.zeros([TOKENS], tl.float32)
    picked = tl.zeros([TOKENS], tl.float32)
    first = split * words_per_split
    last = tl.minimum(first + words_per_split, vocabulary)
    for start in tl.range(first, last, WORDS):
        word = start + tl.arange(0, WORDS)
        logits = _logits(
            hidden_ptr,
            weight_ptr,
            token,
            word,
            tokens,
            vocabulary,
            inner,
            hidden_stride,
            weight_stride,
            BLOCK,
            EVEN,
            WIDEN,
        )
        if softcap is not None:
            logits = tl.cast(softcap, tl.float32) * tanh(logits / tl.cast(softcap, tl.float32))
        inside = (word < last)[None, :]
        if sum_ptr is not None:
            plain += tl.sum(tl.where(inside, logits, 0.0), axis=1)
        picked += tl.sum(tl.where(inside & (word[None, :] == label[:, None]), logits, 0.0), axis=1)
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        highest = higher
    out = split.to(tl.int64) * tokens + token
    tl.store(lse_ptr + out, highest + tl.log(total), mask=token < tokens)
    if sum_ptr is not None:
        tl.store(sum_ptr + out, plain, mask=token < tokens)
    # One split alone holds a label; one outside the vocabulary stays NaN.
    tl.store(picked_ptr + token, picked, mask=(token < tokens) & (label >= first) & (label < last))


@triton.jit
def logit_gradients(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    lse_ptr,
    scale_ptr,
    grad_ptr,
    tokens,
    words,
    first_word,
    inner,
    hidden_stride,
    weight_stride,
    softcap,
    label_smoothing,
    smoothing_per_word,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of scale · d loss / d logit for the `words` rows of the vocabulary that begin at weight_ptr, with first_word."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    logits = _logits(
        hidden_ptr, weight_ptr, token, word, tokens, words, inner, hidden_stride, weight_stride, BLOCK, EVEN, WIDEN
    )
    label = tl.load(labels_ptr + token, mask=token < tokens, other=-1)
    lse = tl.load(lse_ptr + token, mask=token < tokens, other=0.0)
    scale = tl.load(scale_ptr + token, mask=token < tokens, other=0.0)
    if softcap is not None:
        bounded = tanh(logits / tl.cast(softcap, tl.float32))
        logits = tl.cast(softcap, tl.float32) * bounded
    grad = tl.exp(logits - lse[:, None]) - tl.cast(smoothing_per_word, tl.float32)
    hit = (word + first_word)[None, :] == label[:, None]
    grad = tl.where(hit, grad - (1.0 - tl.cast(label_smoothing, tl.float32)), grad) * scale[:, None]
    if softcap is not None:
        grad *= 1.0 - bounded * bounded
    out = grad_ptr + token.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (word < words)[None, :])


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    token,
    word,
    tokens,
    words,
    inner,
    hidden_stride,
    weight_stride,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """hidden[token] · weight[word]ᵀ in fp32; beyond the end the last ones again, as a load without a mask is faster."""
    column = tl.arange(0, BLOCK)
    hidden = hidden_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * hidden_stride + column[None, :]
    weight = weight_ptr + tl.minimum(word, words - 1).to(tl.int64)[None, :] * weight_stride + column[:, None]
    logits = tl.zeros([token.shape[0], word.shape[0]], tl.float32)
    for start in tl.range(0, inner, BLOCK):
        if EVEN:
            a, b = tl.load(hidden + start), tl.load(weight + start)
        else:
            a = tl.load(hidden + start, mask=(start + column < inner)[None, :], other=0.0)
            b = tl.load(weight + start, mask=(start + column < inner)[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        logits = tl.dot(a, b, logits, input_precision="ieee")
    return logits
