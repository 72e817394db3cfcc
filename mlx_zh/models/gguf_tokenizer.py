"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face fast tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from mlx_zh.errors import ModelError
from mlx_zh.models.chat_templates import DEFAULT
from mlx_zh.models.gguf import GGUFFile
from mlx_zh.models.gguf_model import token_id

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# How text is split before merging: patterns applied one after another, as in llama.cpp's llm_tokenizer_bpe.
_CUTS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
TEMPLATE = "tokenizer.chat_template"  # the key of the template; others are at TEMPLATE.NAME
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_CONTROL, _USER_DEFINED = 3, 4


def gguf_tokenizer(file: GGUFFile) -> Any:
    """A PreTrainedTokenizerFast with the file's vocabulary, special tokens and chat template.

    Raises ModelError if the file's kind of tokenizer is not supported or its metadata are damaged.
    """
    metadata = file.metadata
    model, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ModelError(
            f"{file.path} has a tokenizer of kind {model!r}; only byte-level BPE ('gpt2') can be read. Take the "
            "model's safetensors folder, which has a tokenizer of its own."
        )
    if not isinstance(cut, str) or cut not in _CUTS:
        raise ModelError(
            f"{file.path} splits text by the rule {cut!r} (tokenizer.ggml.pre); known rules are {', '.join(_CUTS)}. "
            "Convert it again with a current llama.cpp, or take the model's safetensors folder."
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    if not (_texts(tokens) and tokens and _texts(merges) and isinstance(kinds, list)):
        raise ModelError(f"{file.path} has no usable vocabulary or merges in its metadata. Download it again.")
    try:
        return _wrap(file, _byte_level(file, cut, tokens, merges, kinds), tokens)
    except (TypeError, ValueError, OverflowError) as error:  # what the libraries raise for strange tokens
        raise ModelError(
            f"{file.path}: no tokenizer can be built from its metadata ({error}). Download it again."
        ) from error


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _byte_level(file: GGUFFile, cut: str, tokens: list[str], merges: list[str], kinds: list[int]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    try:
        bpe = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut in _LLAMA3_NAMES)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(
            f"{file.path}: its vocabulary and merges do not fit together ({error}). Download it again."
        ) from error
    tokenizer = Tokenizer(bpe)
    if "qwen" in cut:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _cutter(cut)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _cutter(cut: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _CUTS[cut]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


# A text that every rule above splits differently.
_PROBE = "Hello 你好，世界! 12345 it's IT'S  'll  x=1+2; a\n\n  b\t\r\n c² ½ end.\n $9<=8^7 — “quoted” 3三\u3000  "


def cutting_rule(tokenizer: Any) -> str | None:
    """The name (tokenizer.ggml.pre) of the rule by which a fast tokenizer splits text; None if it is not known here.

    The rule is recognised by how it splits a test text. llama.cpp knows rules by name only, and a wrong name would
    give other tokens without a warning.
    """
    own = tokenizer.backend_tokenizer.pre_tokenizer
    if own is None:
        return None
    pieces = own.pre_tokenize_str(_PROBE)
    return next((name for name in _CUTS if _cutter(name).pre_tokenize_str(_PROBE) == pieces), None)


def _chat_template(metadata: Mapping[str, Any]) -> Any:
    """The file's chat template; with several, all of them by name."""
    default = metadata.get(TEMPLATE)
    others = {
        key.removeprefix(f"{TEMPLATE}."): text for key, text in metadata.items() if key.startswith(f"{TEMPLATE}.")
    }
    others = {name: text for name, text in others.items() if name and isinstance(text, str)}
    if not others:
        return default
    return others | ({DEFAULT: default} if isinstance(default, str) else {})


def _wrap(file: GGUFFile, tokenizer: Any, tokens: list[str]) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    names: dict[str, str] = {}
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = token_id(file, gguf_name)
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{gguf_name}_token_id is {index}, and the vocabulary has {len(tokens)} "
                "tokens. Convert the model again with a current llama.cpp."
            )
        names[f"{name}_token"] = tokens[index]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.pre"] in _LLAMA3_NAMES)
    if adds_bos and (bos := names.get("bos_token")):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        model_max_length=int(metadata.get(f"{file.architecture}.context_length", 2**31)),
        **names,
    )
