"""Small models of Hugging Face transformers and of timm, built from configs, each clipped by AutoClip's defaults.

Each learns to tell two kinds of token sequences or images apart, or to continue a sequence, in 50 steps. Run it with
`make test-zoo`, which installs what it needs.
"""

import math
import sys

import timm
import torch
import transformers as hf
from _common import prepare
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip

STEPS, BATCH = 50, 16
TOKENS = {"vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **TOKENS}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {
    "transformers BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL)),
    "transformers GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, **TOKENS)),
    "transformers LLaMA": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=2, **VIT),
    "timm ResNet": lambda: timm.create_model("resnet10t", pretrained=False, num_classes=2),
}


class Wrapped(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.losses = MODELS[name](), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, tokens, labels = batch
        if isinstance(self.model, (hf.GPT2LMHeadModel, hf.LlamaForCausalLM)):
            loss = self.model(tokens, labels=tokens).loss
        else:
            of_tokens = isinstance(self.model, hf.BertForSequenceClassification)
            logits = self.model(tokens).logits if of_tokens else self.model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def samples() -> TensorDataset:
    """Noise that is brighter on the left or on the right, and numbers modulo 32, two apart, even or odd."""
    labels = torch.randint(2, (STEPS * BATCH,))
    images = torch.randn(len(labels), 3, 32, 32) + (2 * labels - 1).view(-1, 1, 1, 1) * torch.linspace(-1, 1, 32)
    tokens = 2 * (torch.randint(16, (len(labels), 1)) + torch.arange(16)) % 32 + labels.view(-1, 1)
    return TensorDataset(images, tokens, labels)


def falls(name: str, algorithm: str) -> bool:
    """Train, print a row of the table, return whether the loss has fallen."""
    torch.manual_seed(0)
    data, module, autoclip = samples(), Wrapped(name), AutoClip(gradient_clip_algorithm=algorithm, verbose=False)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[autoclip], **off).fit(module, DataLoader(data, BATCH))
    report, first, last = autoclip.report(), sum(module.losses[:5]) / 5, sum(module.losses[-5:]) / 5
    did = report.sections[0].figures
    print(f"{name:20}{algorithm:8}{first:.2f} -> {last:.2f}", end="")
    print(f"{did.clipped_fraction:9.0%}{did.clip_coef_mean:13.2f}  {report.summary}")
    return math.isfinite(last) and last < first


if __name__ == "__main__":
    prepare()
    print("model               by      loss           clipped  mean factor  report")
    fallen = [falls(name, algorithm) for name in MODELS for algorithm in ("norm", "value")]
    if not all(fallen):
        sys.exit("A loss has not fallen.")
