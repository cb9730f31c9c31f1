"""A role's tokenizer, its end tokens, its limits and its chat template, without loading torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionResolutionError,
)
from tokenizers import AddedToken, Tokenizer

from actors.config import ToolParserName
from actors.engine.sizing import context_length
from actors.text import template_files
from actors.text.chat_template import ChatTemplate, ChatTemplateError
from actors.text.message_form import Message
from actors.text.token_bytes import ByteTokenizerAdapter, UnsupportedTokenizer, without_first_space
from actors.text.tool_formats import FORMATS, ToolFormat

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    *template_files.FILES,
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_ADDED_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_LONGEST_CHARACTER = 4  # bytes of a UTF-8 character, so at most so many tokens


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or a text cannot be encoded. The message names a remedy."""


class RoleTokenizer:
    """Text to token ids and back in one model's vocabulary.

    text_tokens, added_tokens: content -> id. Added tokens are found in a text before it is split.
    special_ids: added tokens that decoding skips. eos_ids: each of them ends an answer. stray_ends: end ids in the
    files that are no token of the model. bos_ids, trailing_ids: tokens that the tokenizer puts before and after raw
    text. declared_bos, declared_eos: whether tokenizer_config.json says so; None if it does not say. width: columns of
    the model's logits rows. beyond_width: tokens without a column, content -> id. tied: True if embeddings and head
    share their weights; None if the config has no such key. max_position: the model's context length in tokens, or
    None. recommended: sampling parameters by name, as generation_config.json states them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        """settings, config, generation: the contents of tokenizer_config.json, config.json, generation_config.json.

        template, tool_template: chat templates of conversations, and of those with tools if that is another one.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _declare_added(tokenizer, settings)
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of single tokens, as they were asked for
        declared = tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {token.content: id_ for id_, token in declared.items()}
        self.special_ids = frozenset(id_ for id_, token in declared.items() if token.special)
        plain = tokenizer.get_vocab(with_added_tokens=False)
        self.text_tokens: dict[str, int] = {text: id_ for text, id_ in plain.items() if text not in self.added_tokens}
        inner = config.get("text_config") or config
        self.width: int = inner.get("vocab_size") or config.get("vocab_size") or tokenizer.get_vocab_size()
        self.beyond_width = {
            text: id_ for text, id_ in (self.text_tokens | self.added_tokens).items() if id_ >= self.width
        }
        self.tied: bool | None = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        self.max_position = context_length(config)
        named = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name)}
        self.eos_ids, self.stray_ends = self._find_ends(named.get("eos_token"), generation or {}, inner, config)
        self.bos_ids, self.trailing_ids = self._find_raw_text_ends()
        self.declared_bos, self.declared_eos = (settings.get(f"add_{end}_token") for end in ("bos", "eos"))
        stated = generation or {}
        self.recommended = {name: stated[name] for name in _RECOMMENDED if stated.get(name) is not None}
        self._template = ChatTemplate(template, named) if template else None
        self.tool_template = ChatTemplate(tool_template, named) if tool_template else self._template

    @classmethod
    def load(cls, path: str, revision: str | None = None) -> RoleTokenizer:
        """The tokenizer in a local folder or of a hub model, of which only the small files in FILES are fetched.

        Raises TokenizerError with a command that helps.
        """
        folder = _folder(path, revision)
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(
                f"{path} has no tokenizer.json; convert its tokenizer once and put the folder into the configuration: "
                f"python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{path}')"
                ".save_pretrained('FOLDER')\""
            )
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
        settings = {**_json(folder / "special_tokens_map.json"), **_present(_json(folder / "tokenizer_config.json"))}
        generation = _json(folder / "generation_config.json")
        try:
            templates = template_files.find_templates(folder, settings, _json(folder / template_files.OLDER))
            return cls(tokenizer, settings, _json(folder / "config.json"), generation, *templates)
        except TokenizerError:
            raise
        except ChatTemplateError as error:
            raise TokenizerError(f"{path}: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            what = "config.json, generation_config.json or tokenizer_config.json holds a value of another kind"
            raise TokenizerError(f"{path}: {what} than transformers writes ({error}); download it again") from error

    @cached_property
    def adapter(self) -> ByteTokenizerAdapter:
        """The encoder of text in the middle of an answer. Raises UnsupportedTokenizer for kinds without bytes."""
        return ByteTokenizerAdapter(self._tokenizer, self.text_tokens)

    @property
    def has_chat_template(self) -> bool:
        """True if `render` can be called."""
        return self._template is not None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`. special: with the tokens that the tokenizer puts around raw text, such as a BOS."""
        return _encode(self._tokenizer, text, special)

    def encode_parts(self, parts: Sequence[str], special: bool = False) -> list[int]:
        """Token ids of texts one behind the other; no token crosses from one to the next, so no special one either."""
        rest = [id_ for part in parts[1:] for id_ in self.encode_continuation(part)]
        return self.encode(parts[0], special) + rest

    @cached_property
    def ids_beside_text(self) -> frozenset[int]:
        """The ids that no text of an answer may become: special, added and end tokens."""
        return self.special_ids.union(self.added_tokens.values(), self.eos_ids)

    @cached_property
    def special_texts(self) -> re.Pattern[str]:
        """Finds the texts of special tokens, of two characters and more."""
        special = self.special_ids.union(self.eos_ids)
        texts = [text for text, id_ in self.added_tokens.items() if id_ in special and len(text) > 1]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` after other text: without the space that SentencePiece puts before a text's beginning."""
        return _encode(self._continuing, text, False)

    @cached_property
    def _continuing(self) -> Tokenizer:
        return without_first_space(self._tokenizer)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def text_of(self, id_: int) -> str:
        """The text of one token without any before it, special or not."""
        text = self._texts.get(id_)
        if text is None:
            text = self._texts[id_] = self.decode((id_,), skip_special=False)
        return text

    def stream(self, after: Sequence[int] = (), skip_special: bool = True, shown: Collection[int] = ()) -> TextStream:
        """An incremental decoder. after: tokens before the first one, such as a prompt, so that its space is kept.

        shown: special ids that are decoded although special ones are skipped.
        """
        return TextStream(self, after, skip_special, shown)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> str:
        """The messages rendered by this model's chat template. Raises ChatTemplateError with a text for clients."""
        template = self.tool_template if tools else self._template
        if template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions with the whole prompt")
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_arguments,
        )

    def tool_format(self, parser: Literal["auto"] | ToolParserName) -> ToolFormat:
        """The form of its tool calls: the one of this name; "auto": that of its chat template, else plain JSON."""
        if parser != "auto":
            return FORMATS[parser]
        return (self.tool_template.tool_format if self.tool_template else None) or FORMATS["json"]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as its vocabulary writes it ("Ġis", "▁is"); "" for an id that is no token."""
        return [self._tokenizer.id_to_token(id_) or "" for id_ in ids]

    @cached_property
    def spaces_added(self) -> bool:
        """True if its decoder puts a space between two added tokens."""
        return any(self.decode([id_] * 2, skip_special=False) != text * 2 for text, id_ in self.added_tokens.items())

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token adds to a text: the content of an added token; b"" for an id that is no token."""
        texts = self._token_texts
        if id_ < len(texts) and (text := texts[id_]) is not None:
            return text
        return self.decode([id_], skip_special=False).encode() if self.is_token(id_) else b""

    def encode_bytes(self, text: bytes) -> list[int]:
        """Ids of bytes, none of them special; empty for bytes that the vocabulary cannot write."""
        try:
            return self.adapter.encode(text.decode())[0]
        except UnicodeDecodeError:
            return self.adapter.encode_bytes(text)
        except UnsupportedTokenizer:
            return []

    def ids_with_byte(self, byte: int) -> list[int]:
        """The ids of tokens whose text has this byte."""
        texts = self._token_texts or [self.token_bytes(id_) for id_ in range(self.width)]
        found = [id_ for id_, text in enumerate(texts) if text is not None and byte in text]
        return found + [id_ for id_ in self.added_tokens.values() if byte in self.token_bytes(id_)]

    @cached_property
    def _token_texts(self) -> Sequence[bytes | None]:
        try:
            return self.adapter.texts
        except UnsupportedTokenizer:  # such a kind can only decode its tokens
            return ()

    def lead(self, ids: Sequence[int]) -> int:
        """Number of leading ids that the tokenizer puts before raw text."""
        length = len(self.bos_ids)
        return length if tuple(ids[:length]) == self.bos_ids else 0

    def is_token(self, id_: int) -> bool:
        """True if an id is a token. Rows may be wider than the vocabulary."""
        return self._tokenizer.id_to_token(id_) is not None

    def _find_ends(self, eos_token: str | None, *configs: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        """The end ids of the first config that names one, and of tokenizer_config.json; and those that are no token."""
        ends: list[int] = []
        stray: list[Any] = []
        for config in configs:
            stated = list(_flattened(config.get("eos_token_id")))
            valid = [id_ for id_ in stated if type(id_) is int and 0 <= id_ < self.width]
            stray += [id_ for id_ in stated if id_ not in valid]
            ends = ends or valid
        named = None if eos_token is None else self._tokenizer.token_to_id(eos_token)
        if named is not None:
            (ends if named < self.width else stray).append(named)
        return tuple(dict.fromkeys(ends)), tuple(each for at, each in enumerate(stray) if each not in stray[:at])

    def _find_raw_text_ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the tokenizer puts before and after raw text."""
        plain, whole = self.encode("a"), self.encode("a", special=True)
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])


class TextStream:
    """Decodes tokens one by one to pieces that join to the text of all tokens.

    It decodes new tokens together with the last ones before them, which works for every decoder: in SentencePiece
    vocabularies the space of a word depends on its neighbour, and in all of them a character may span several tokens.
    """

    def __init__(
        self,
        tokenizer: RoleTokenizer,
        after: Sequence[int] = (),
        skip_special: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_ids.difference(shown) if skip_special else frozenset()
        self._decoded = [id_ for id_ in after[-2 * _LONGEST_CHARACTER :] if self._has_text(id_)]
        self._held: list[int] = []

    def push(self, id_: int) -> str:
        """The text of one more token that no later token can change; "" while a character is incomplete."""
        if not self._has_text(id_):
            return ""
        self._held.append(id_)
        text = self._new_text(self._held)
        if text and not text.endswith("�"):
            return self._release(len(self._held), text)
        if len(self._held) >= _LONGEST_CHARACTER:  # the oldest token is part of no character
            return self._release(1, self._new_text(self._held[:1]))
        return ""

    def flush(self) -> str:
        """The text held back, if no token follows."""
        return self._release(len(self._held), self._new_text(self._held)) if self._held else ""

    def _has_text(self, id_: int) -> bool:
        return id_ not in self._skipped and self._tokenizer.is_token(id_)

    def _release(self, count: int, text: str) -> str:
        self._decoded, self._held = self._held[:count], self._held[count:]
        return text

    def _new_text(self, held: list[int]) -> str:
        decoded, tokenizer = self._decoded, self._tokenizer
        one = len(decoded) == 1
        before = tokenizer.text_of(decoded[0]) if one else tokenizer.decode(decoded, skip_special=False)
        both = tokenizer.decode(decoded + held, skip_special=False)
        if both.startswith(before):
            return both[len(before) :]
        return self._tokenizer.decode(held, skip_special=False)  # a bad byte changed the text of the bytes before it


def _encode(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    except TypeError:  # the library's error for a str that is not UTF-8
        raise TokenizerError("the text holds half of a surrogate pair, which is no character") from None
    return ids


def _folder(path: str, revision: str | None) -> Path:
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise TokenizerError(f"there is no folder {path}; check the path in the configuration")
    command = f"hf download {path}" + (f" --revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise TokenizerError(
            f"{path} asks its users to accept terms: do so at https://huggingface.co/{path}, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise TokenizerError(
            f"{path} is neither a folder here nor a model on the hub; check its spelling, or run `hf auth login` "
            "if it is private"
        ) from error
    except (HfHubHTTPError, RevisionResolutionError, OSError) as error:
        raise TokenizerError(f"{path} is not in the cache and cannot be fetched ({error}); run `{command}`") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON ({error}); download it again") from error
    return value


def _present(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _flattened(ids: Any) -> Iterator[Any]:
    """The ids in a value of eos_token_id: one, a list, or lists in a list."""
    if isinstance(ids, list):
        for each in ids:
            yield from _flattened(each)
    elif ids is not None:
        yield ids


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _declare_added(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens of tokenizer_config.json: older checkpoints declare added or special tokens there alone."""
    added = tokenizer.get_added_tokens_decoder()
    declared: Mapping[str, Mapping[str, Any]] = settings.get("added_tokens_decoder") or {}
    for id_, fields in sorted((int(key), fields) for key, fields in declared.items()):
        token = AddedToken(**{name: fields[name] for name in _ADDED_FIELDS if name in fields})
        if id_ not in added or added[id_].special != token.special:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != id_:
            raise TokenizerError(f"tokenizer_config.json gives {token.content!r} the id {id_}, tokenizer.json another")
