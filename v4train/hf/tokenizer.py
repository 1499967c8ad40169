"""Our tokenizer as transformers loads it.

`AutoTokenizer` gives BOS + the ids of `Tokenizer.encode`, which is how a document begins in training; a special token's
name in a text is ordinary text there too.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import processors

from v4train.data import Tokenizer
from v4train.errors import ConfigError
from v4train.hf.compare import sample_texts

CHARACTERS = 20_000  # of each real text
REPORT = "please report this tokenizer: nothing is written"
# Where tokenizers differ, if they do; special tokens' names are added
TRICKY = (
    "",
    " ",
    "  two  spaces, \t\ttabs\r\nand\r\n\r\n \n lines \n",
    "if x:\n\treturn {'a': [1, 22, 333, 4444444]}  # don't!!\n",
    "naïve café, cafe\u0301, Straße, ﬁ ½ ①",
    "東京とソウル、北京市。한국어 العربية हिन्दी",
    "\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd e\u0301\u200d\u00a0\ufeff\u2028\x00\x7f",
)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of its BOS, EOS and PAD, by transformers' keys."""
    names = {token["id"]: token["content"] for token in json.loads(tokenizer.json)["added_tokens"]}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {key: names[i] for key, i in ids.items()}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json, ours but for the BOS it adds, and tokenizer_config.json. max_length: tokens of a row in training.

    The BOS has to stand in tokenizer.json: transformers 5.24 ignores `add_bos_token` where there is one.
    """
    names = special_tokens(tokenizer)
    bos = names["bos_token"]
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())  # in which all tokens of a role are special
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.bos_id)]
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "split_special_tokens": True,  # "<eos>" in a text is five characters
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare what AutoTokenizer makes of the folder with ours, on real texts and on tricky ones.

    Raises:
        ConfigError: a text for which they differ, or another id of a special token.
    """
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(folder)
    names = [token["content"] for token in json.loads(tokenizer.json)["added_tokens"]]
    for text in (*(text[:CHARACTERS] for text in sample_texts()), *TRICKY, " ".join(["a", *names, "b"])):
        ids = tokenizer.encode(text).tolist()
        found = {
            "ids with special tokens": (peer(text, verbose=False)["input_ids"], [tokenizer.bos_id, *ids]),
            "ids": (peer(text, add_special_tokens=False, verbose=False)["input_ids"], ids),
            "decoded text": (peer.decode(ids, skip_special_tokens=True), tokenizer.decode(ids)),
        }
        for what, (theirs, ours) in found.items():
            if theirs != ours:
                rule = f"transformers {what} of {ascii(text[:60])} differ"
                raise ConfigError("tokenizer", "tokenizer.json", rule, REPORT)
    theirs = (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id)
    if theirs != (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
        raise ConfigError("tokenizer", "tokenizer.json", f"transformers gives BOS, EOS and PAD ids {theirs}", REPORT)
