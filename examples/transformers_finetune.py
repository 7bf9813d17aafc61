"""Fine-tune PaliGemma with transformers' own Trainer, on these kernels: teach the built-in model to answer in German.

Only `patch` is not transformers' code. To use a released checkpoint, put its name in the place of CHECKPOINT.
The example runs in seconds on a CPU, from the repository: `python examples/transformers_finetune.py`.
"""

import tempfile

import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration, Trainer, TrainingArguments

from pg_kernels.integrations.transformers import patch
from pg_kernels.model import EMBEDDED_CHECKPOINT

CHECKPOINT = EMBEDDED_CHECKPOINT
PROMPT, ANSWER = "caption de", "eine banane und eine eule"


def collate(images, processor):
    """Return a batch. The processor marks prompts as prefix (token type 0), answers as suffix (1), and labels the answers."""
    texts = [f"<image>{PROMPT}"] * len(images)
    return processor(text=texts, images=images, suffix=[ANSWER] * len(images), return_tensors="pt", padding="longest")


def answer(model, processor, image):
    inputs = processor(text=f"<image>{PROMPT}", images=image, return_tensors="pt")
    tokens = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = PaliGemmaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    patch(model)

    picture = Image.open(EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png").convert("RGB")
    pictures = [picture, ImageOps.mirror(picture)] * 60
    print("before:", answer(model, processor, picture))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            warmup_steps=5,
            num_train_epochs=1,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,  # the collator needs the columns that the model does not take
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=pictures,
            data_collator=lambda images: collate(images, processor),
        ).train()
    print("after:", answer(model, processor, picture))


if __name__ == "__main__":
    main()
