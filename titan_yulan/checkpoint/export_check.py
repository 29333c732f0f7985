"""Is what an export wrote the model of the checkpoint? Read again by those who will read it, and compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.exported_state import open_exported_state
from titan_yulan.checkpoint.hugging_face import (
    CONFIG,
    HuggingFaceFolder,
    check_tensors,
    open_hugging_face,
    parameter_shapes,
)
from titan_yulan.checkpoint.hugging_face_weights import load_hugging_face
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.read_parts import read_parts
from titan_yulan.config.model import ModelConfig
from titan_yulan.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from titan_yulan.errors import RunError
from titan_yulan.model import Decoder
from titan_yulan.parallel.fsdp import is_replicated

# The largest difference of a logit that is taken, as a share of the largest logit. All is computed in float32; in the
# 16-bit types the weights have been rounded, by up to 2^-9 and 2^-12 of their values, in every layer: 0.0044 and 0.0004
# were measured on the trained debug model, 0.0037 and 0.0005 on 56 random layers.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.004}

# A row of text, and one of ids spread over the vocabulary.
_ROW = 256

TEXT = """\
The quick brown fox didn't jump; it\u2019s 1,234,567.89 m away -- naïve café, Ærøskøbing, Straße, \u0130stanbul.
    def area(radius: float) -> float:
\treturn 3.14159 * radius ** 2  # \u03c0r\xb2, trailing blanks:\x20\x20\x20



预训练语言模型的数据质量很重要。今天是2024年12月23日，天气很好！「引号」、全角\u3000空格。日本語のテキスト、한국어 문장.
Если x\u2208\u211d, то \u2200\u03b5>0 \u2203\u03b4: |f(x)\u2212f(a)|<\u03b5.  \u222b\u2080\xb9 x\xb2 dx = \u2153
\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645,
\u05e9\u05dc\u05d5\u05dd, \u0939\u093f\u0928\u094d\u0926\u0940
\U0001f680\U0001f469\u200d\U0001f4bb\U0001f1e8\U0001f1f3 e\u0301 \xa0\u2003\u2028\x85\x0b\x1c mixed\r
line ends\r
<|endoftext|> is text here, <s>[INST]{"key": [1, 2.5e-7, null]}</s> WE'LL they'RE 'tis O'Neil's
aaaaaaaaaaaaaaaaaaaaaaa ============ \u2026\u2026 0x7fff_ffff 192.168.0.1 https://example.org/?q=a%20b&c=d#e
"""


def verify_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """The files in `folder`, read by the package tokenizers, must give the tokenizer's ids: of `TEXT`, and of all
    tokens of a tiktoken vocabulary one behind the other.

    Returns:
        What was found, in a line.

    Raises:
        RunError: they do not.
    """
    if importlib.util.find_spec("tokenizers") is None:
        return (
            "NOT VERIFIED: the package tokenizers, which would read tokenizer.json, is missing. "
            "pip install 'titan-yulan[huggingface]' and export again"
        )
    written = HuggingFaceTokenizer.open(folder)
    if (written.eos_id, written.vocab_size) != (tokenizer.eos_id, tokenizer.vocab_size):
        raise RunError(
            f"{folder.name}: tokenizer.json has another end of text or another size than the tokenizer; export with "
            "--no-verify and use the vocabulary itself"
        )
    texts = [TEXT]
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        texts.append(tokenizer.decode(range(tokenizer.vocab_size)))
    for text in texts:
        ours, theirs = tokenizer.encode(text), written.encode(text)
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            near = tokenizer.decode(ours[max(0, place - 3) : place + 5])
            raise RunError(
                f"a tokenizer.json of this vocabulary gives other ids than tiktoken does, first near {near!r}; export "
                "with --no-verify and use the vocabulary itself"
            )
    return f"verified: tokenizer.json gives the same ids for {sum(map(len, texts)):,} characters"


def verify_llama(checkpoint: Checkpoint, model: ModelConfig, tokenizer: Tokenizer, folder: Path, dtype: str) -> str:
    """transformers must load the folder with no key missing and none left over, and its logits must be ours. One model
    is in memory at a time.

    Args:
        dtype: of the weights in the folder; both models compute in float32.

    Returns:
        What was found, in a line.

    Raises:
        RunError: they differ by more than `BOUNDS`.
    """
    try:
        import transformers
    except ImportError:
        return (
            "NOT VERIFIED: the package transformers, which would read the folder, is missing. pip install transformers "
            "and export again, or compare by hand"
        )
    rows = _rows(model, tokenizer)
    expected = _our_logits(checkpoint, model, rows)
    peer, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    wrong = {kind: keys for kind, keys in found.items() if keys and kind != "error_msgs"}
    if wrong or type(peer).__name__ != "LlamaForCausalLM":
        raise RunError(
            f"transformers does not load the export as it should: {type(peer).__name__}, {wrong}; take "
            "another version of transformers, or export with --no-verify"
        )
    with torch.inference_mode():
        logits = peer.eval()(rows).logits
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    agreeing = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    line = (
        f"transformers {transformers.__version__}: no key missing, none unexpected; largest difference of "
        f"{expected.numel():,} logits {difference:.3g} (the largest logit is {largest:.3g}); the most likely token is "
        f"the same at {agreeing:.1%} of {rows.numel()} places"
    )
    if not difference <= BOUNDS[dtype] * largest:
        raise RunError(
            f"the export is not the model: {line}. At most {BOUNDS[dtype]:g} of the largest logit is taken for {dtype}"
            + ("; try --dtype float32" if dtype != "float32" else "")
        )
    return f"verified: {line}"


def verify_yulan(checkpoint: Checkpoint, model: ModelConfig, folder: Path, dtype: str) -> str:
    """Our importer must give back every parameter to the bit (matrices rounded to `dtype`), and the model.

    Raises:
        RunError: it does not.
    """
    opened = open_hugging_face(folder)
    check_tensors(opened, model)
    if opened.model.to_published() != model.to_published():
        raise RunError(f"{CONFIG} of the export does not give the model back; use --format llama")
    _compare(opened, checkpoint, model, getattr(torch, dtype))
    return f"verified: {len(opened.tensors)} tensors, read again, are the checkpoint's to the bit"


def verify_moments(checkpoint: Checkpoint, model: ModelConfig, folder: Path) -> str:
    """As `verify_yulan`, for Adam's moments."""
    state = open_exported_state(folder)
    for kind, moment in state.moments.items():
        _compare(moment, checkpoint, model, torch.float32, kind)
    return f"verified: the moments too, after {state.progress.trained:,} updates"


def _compare(
    opened: HuggingFaceFolder, checkpoint: Checkpoint, model: ModelConfig, dtype: torch.dtype, moment: str = ""
) -> None:
    """Every tensor of a folder with the checkpoint's parameter, or with its moment."""
    tensors = {name: torch.empty(shape) for name, shape in parameter_shapes(model).items()}
    load_hugging_face(opened, tensors)
    sources = {f"{name}.{moment}" if moment else name: name for name in tensors}
    for source, stored in read_parts(checkpoint, sources, "optimizer" if moment else "model"):
        name = sources[source]
        expected = stored if is_replicated(name) else stored.to(dtype).float()
        if not torch.equal(tensors.pop(name).view(torch.int32), expected.view(torch.int32)):
            raise RunError(f"the export is not the checkpoint: {source} differs; look at the disk, and export again")


def _rows(model: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """(2, seq) ids: `TEXT`, and ids spread over the vocabulary."""
    ids = tokenizer.encode(TEXT)[: min(_ROW, model.max_position_embeddings)]
    spread = torch.linspace(0, model.vocab_size - 1, len(ids)).long()
    return torch.stack((torch.tensor(ids), spread))


@torch.inference_mode()
def _our_logits(checkpoint: Checkpoint, model: ModelConfig, rows: Tensor) -> Tensor:
    with torch.device("meta"):  # random values for billions of weights would take minutes
        decoder = Decoder(model)
    decoder.to_empty(device="cpu")
    store.load(checkpoint, {"model": dict(decoder.named_parameters())})
    return decoder(rows)
