import random

import pytest

from rwkv_train.data.instruct.conversation import Message
from rwkv_train.data.instruct.templates import G1_SOURCE, ChatTemplate, Piece
from rwkv_train.data.instruct.tokens import Run, is_cut_as_whole, tokenize
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer

MESSAGES = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""


@pytest.fixture
def template(tmp_path):
    def make(source):
        path = tmp_path / "chat.jinja"
        path.write_text(source, encoding="utf-8")
        return ChatTemplate(str(path))

    return make


def test_g1_writes_the_official_form():
    pieces = ChatTemplate("g1").pieces(
        [*MESSAGES[:2], Message("assistant", "<think>\n\nx\r\n\r\n</think>\na{{ b }}")]
    )
    assert pieces == [
        Piece("System: s\n\n", 0, is_answer=False),
        Piece("User: u\n\n", 1, is_answer=False),
        Piece("Assistant:", 2, is_answer=False),
        Piece(" <think>\nx\n</think>\na{{ b }}\n\n", 2, is_answer=True),
    ]


def test_g1_writes_each_message_alone_as_it_does_in_a_conversation(template):
    messages = [
        *MESSAGES,
        Message("user", "\n\nv "),
        Message("assistant", ""),
        Message("assistant", "b\n\nc"),
    ]
    assert ChatTemplate("g1").pieces(messages) == template(G1_SOURCE).pieces(messages)


def test_a_template_for_hugging_face_is_cut_where_its_answer_begins(template):
    pieces = template(CHATML).pieces(MESSAGES)
    assert [piece.text for piece in pieces] == [
        "<|im_start|>system\ns<|im_end|>\n",
        "<|im_start|>user\nu<|im_end|>\n",
        "<|im_start|>assistant\n",
        "a<|im_end|>\n",
    ]
    assert [piece.is_answer for piece in pieces] == [False, False, False, True]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
            "does not write message 2",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}",
            r"message 3 after the prompt for an answer: 'Bot:' becomes 'a' at character 2",
        ),
        ("{{ messages[1].content }}", "fails: .*has no element 1"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "fails: no system"),
        ("{{ messages.append(1) }}", "fails: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "fails: .*unsafe"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ 5 | dictsort }}", "fails: 'int' object has no attribute 'items'"),
        ("{% for m in messages %}{{ m.contnet }}{% endfor %}", "fails: .*no attribute 'contnet'"),
    ],
    ids=[
        "depends on the end",
        "another heading",
        "undefined",
        "raises",
        "changes",
        "escapes",
        "arithmetic",
        "no mapping",
        "misspelt",
    ],
)
def test_a_template_that_fails_or_is_no_concatenation_is_refused(template, source, message):
    with pytest.raises(DataError, match=message):
        template(source).pieces(MESSAGES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{% for m in %}", r"chat\.jinja, line 2: "),
        ("{% generation %}x{% endgeneration %}", "line 1: .*remove the generation tags"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, r"chat\.jinja is nested too deeply: too many"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"chat\.jinja is nested too deeply: maximum rec"),
    ],
    ids=["syntax", "generation", "blocks", "brackets"],
)
def test_what_is_no_template_is_refused_with_its_line(template, source, message):
    with pytest.raises(DataError, match=message):
        template(source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such", "No such file"),
        ("~nobody-of-this-name/chat.jinja", "home directory"),
        ("a\0b", "null byte"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, reason):
    with pytest.raises(DataError, match=rf"cannot read the template {name}: .*{reason}.*wanted 'g1'"):
        ChatTemplate(name)


def test_names_that_are_not_defined_can_be_asked_for(template):
    source = (
        "{% if tools %}t{% endif %}{% if not messages[0].tool_calls %}{{ messages[0].content }}{% endif %}"
    )
    assert template(source).prompt(MESSAGES) == "s"


def test_json_is_written_without_escapes_for_html(template):
    messages = [Message("user", "é <b> & 'it'")]
    text = template(
        "{{ messages[0] | tojson }} {{ messages[0].content | tojson(ensure_ascii=True) }}"
    ).prompt(messages)
    assert text == '{"role": "user", "content": "é <b> & \'it\'"} "\\u00e9 <b> & \'it\'"'


def test_the_end_of_a_turn_is_what_follows_an_answer(template):
    assert ChatTemplate("g1").turn_end() == "\n\n"
    assert template(CHATML).turn_end() == "<|im_end|>\n"
    with pytest.raises(DataError, match="does not write the answer 'answer' as it stands"):
        template("{% for m in messages %}{{ m.content | upper }}{% endfor %}").turn_end()


def test_with_g1_and_world_the_runs_give_the_tokens_of_the_whole_text():
    tokenizer = load_tokenizer("world")
    # Why: nothing that crosses a place where the mask changes is in the vocabulary.
    pieces = [tokenizer.decode_bytes([token]) for token in range(1, tokenizer.vocab_size)]
    assert not [piece for piece in pieces if b"t: " in piece or piece.startswith((b": ", b":\n"))]
    assert not [piece for piece in pieces if b"\n\n" in piece and piece.strip()]

    generator = random.Random(3)
    letters = ["a", " ", "\n", ":", "User", ".", "日", "  ", "\t", "0"]
    for _ in range(200):
        content = ["".join(generator.choices(letters, k=generator.randrange(12))) for _ in range(4)]
        messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(content)]
        runs = [Run(piece.text, piece.is_answer) for piece in ChatTemplate("g1").pieces(messages)]
        assert is_cut_as_whole(tokenize("", runs, tokenizer), runs, tokenizer), content


def test_a_token_never_lies_across_the_beginning_of_an_answer():
    tokenizer = load_tokenizer("world")
    runs = [Run("The answer is", is_learned=False), Run("land", is_learned=True)]  # " island" is one token
    conversation = tokenize("", runs, tokenizer)

    prompt, answer = tokenizer.encode("The answer is"), tokenizer.encode("land")
    assert conversation.tokens.tolist() == [0, *prompt, *answer, 0]
    assert conversation.is_learned.tolist() == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    assert not is_cut_as_whole(conversation, runs, tokenizer)
