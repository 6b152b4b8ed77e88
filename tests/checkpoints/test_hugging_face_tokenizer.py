import hashlib
import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from rwkv_train.checkpoints.hugging_face import tokenizer_files
from rwkv_train.tokenizers import TokenizerIdentity, load_tokenizer

TEXTS = [
    "",
    "The quick brown fox.\n\n\tdef f(x):\n        return x**2 + 1e-5\r\n",
    "  two  spaces at both ends  ",
    "User: 请介绍北京的旅游景点。\n\nAssistant: 故宫，位于北京市中心！",  # noqa: RUF001
    "naïve café façade, Ærøskøbing, Привет, мир! ¿Qué? ½ 10³ 日本語のテキスト 한국어 עברית العربية",
    "e\u0301\u0327 \u200b\u2028\u3000\u00a0\x00\x07\x1f\x7f\x85 \U0001f469\u200d\U0001f680 \U00010ffff",
    "aaaa" * 20 + "=" * 79 + "0123456789" * 5 + "\n" * 7 + "camelCaseIDs2x4_snake-case@example.com",
]


@pytest.fixture(scope="module", params=["world", "bytes"])
def ours(request):
    return load_tokenizer(request.param)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def make(files, model_type):
        folder = tmp_path_factory.mktemp("folder")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return folder

    return make


@pytest.fixture(scope="module")
def theirs(ours, write):
    # Of a type that transformers does not know by itself, so that the folder's files alone count.
    return AutoTokenizer.from_pretrained(write(tokenizer_files(ours.identity, 65_536).files, "rwkv7"))


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_gives_our_ids_and_the_text_back(ours, theirs, text):
    ids = theirs(text).input_ids

    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


def test_transformers_gives_our_ids_wherever_tokens_meet(ours, theirs):
    # Tokens and characters of all kinds side by side: a cut in a wrong place would show.
    chance = random.Random(0)
    tokens = [ours.decode_bytes([token]).decode(errors="ignore") for token in range(1, ours.vocab_size)]
    joined = sorted({char for token in tokens if len(token) > 1 for char in token})
    anything = [chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000]
    texts = [
        "".join(chance.choice(chance.choice([tokens, joined or tokens, anything])) for _ in range(60))
        for _ in range(500)
    ]

    assert [theirs(text).input_ids for text in texts] == ours.encode_batch(texts)


def test_the_end_of_a_document_is_token_0(ours, theirs):
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (0, 0, ours.vocab_size)
    assert theirs.decode([0, *ours.encode("a")], skip_special_tokens=True) == "a"


def test_rwkv4_folders_take_their_own_tokenizer_and_not_that_of_their_type(write):
    files = tokenizer_files(None, 65_536).files

    theirs = AutoTokenizer.from_pretrained(write(files, "rwkv"))

    assert theirs("Hello world").input_ids == load_tokenizer("world").encode("Hello world")


def test_world_comes_with_its_published_file():
    # Size and MD5 of the file in the repositories of its author, with LF at the ends of lines.
    found = tokenizer_files(None, 65_536)

    content = found.files["rwkv_vocab_v20230424.txt"]
    assert (len(content), content.count(b"\n")) == (1_093_733, 65_529)
    assert hashlib.md5(content).hexdigest().startswith("dd194")
    assert "World" in found.note


@pytest.fixture
def own_tokenizer(tmp_path):
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["one two three two one"], trainer)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    return path


def test_a_tokenizer_json_is_copied(own_tokenizer, write):
    ours = load_tokenizer(str(own_tokenizer))

    found = tokenizer_files(ours.identity, 300)

    assert found.files["tokenizer.json"] == own_tokenizer.read_bytes()
    assert (found.end_of_document, found.note) == (1, None)
    theirs = AutoTokenizer.from_pretrained(write(found.files, "rwkv"))
    assert (theirs("one two").input_ids, theirs.eos_token_id) == (ours.encode("one two"), 1)


def test_nothing_is_downloaded(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)

    found = tokenizer_files(TokenizerIdentity("neox", "ab" * 32), 50_277)

    assert found.files == {}
    assert "'neox' is not in the Hugging Face cache" in found.note


def test_neox_is_taken_from_the_cache(monkeypatch, own_tokenizer):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(own_tokenizer))
    identity = TokenizerIdentity("neox", hashlib.sha256(own_tokenizer.read_bytes()).hexdigest())

    found = tokenizer_files(identity, 50_277)

    assert found.files["tokenizer.json"] == own_tokenizer.read_bytes()


@pytest.mark.parametrize(
    ("identity", "vocab_size", "reason"),
    [
        (None, 50_277, "the weights do not say which tokenizer"),
        (TokenizerIdentity("world", "ab" * 32), 65_536, "is not the one the model was trained with"),
        (TokenizerIdentity("gone.json", "ab" * 32), 300, "there is no tokenizer 'gone.json'"),
    ],
    ids=["unknown", "another", "gone"],
)
def test_where_there_is_no_tokenizer_the_note_says_why(identity, vocab_size, reason):
    found = tokenizer_files(identity, vocab_size)

    assert (found.files, found.end_of_document) == ({}, 0)
    assert reason in found.note
