import pytest

from engine.errors import CheckpointError
from server.chat_template import GUANACO, ChatTemplate, choose_template, load_override, render
from server.errors import ApiError
from tests.server.fake_engine import add_adapter, build_state

USER = {"role": "user", "content": "Hi"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source=source, origin="the test's template")


def test_guanaco_format():
    messages = [USER, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}]
    text = render(GUANACO, messages, special_tokens={})
    assert text.startswith("A chat between a curious human and an artificial intelligence")
    assert text.endswith("questions. ### Human: Hi### Assistant: Yo### Human: Bye### Assistant:")


def test_guanaco_takes_a_system_message_in_place_of_the_preamble():
    text = render(GUANACO, [{"role": "system", "content": "Be brief."}, USER], special_tokens={})
    assert text == "Be brief. ### Human: Hi### Assistant:"


def test_guanaco_continues_the_last_message():
    messages = [USER, {"role": "assistant", "content": "Well, "}]
    text = render(
        GUANACO,
        messages,
        special_tokens={},
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert text.endswith("### Human: Hi### Assistant: Well, ")


def test_precedence():
    state = build_state()
    add_adapter(state, "plain")
    add_adapter(state, "guanaco-7b", is_guanaco=True)
    add_adapter(state, "own", chat_template="own", is_guanaco=True)
    override = template("override")

    def chosen(name, override=None, folder="folder"):
        adapter = state.registry.resolve(name) if name else None
        found = choose_template(override, adapter=adapter, folder_template=folder)
        return found and found.source

    assert chosen("own", override) == "override"
    assert chosen("own") == "own"
    assert chosen("guanaco-7b") == GUANACO.source
    assert chosen("plain") == "folder"
    assert chosen(None) == "folder"
    assert chosen(None, folder=None) is None


def test_templates_in_guanacos_format_bring_its_stop_strings():
    found = choose_template(None, adapter=None, folder_template="### Human: {{ messages }}")
    assert found is not None
    assert "### Human:" in found.stops


def test_of_several_templates_the_one_for_tools_is_taken_with_tools():
    several = ChatTemplate(source={"default": "plain", "tool_use": "tools"}, origin="x")
    assert several.text(with_tools=False) == "plain"
    assert several.text(with_tools=True) == "tools"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].missing.deeper }}", "missing"),
        ("{{ messages[5].content }}", "messages|list"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% if %}", "Expected"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_a_400_with_its_message(source, message):
    with pytest.raises(ApiError, match=message) as caught:
        render(template(source), [USER], special_tokens={})
    assert caught.value.status == 400
    assert caught.value.code == "chat_template_error"


def test_template_arguments_reach_the_template():
    text = render(
        template("{{ bos_token }}{{ mood }}"),
        [USER],
        special_tokens={"bos_token": "<s>"},
        template_kwargs={"mood": "calm"},
    )
    assert text == "<s>calm"


@pytest.mark.parametrize("name", ["messages", "chat_template", "tools", "add_generation_prompt"])
def test_arguments_of_the_servers_own_cannot_be_overridden(name):
    with pytest.raises(ApiError, match=name) as caught:
        render(template("x"), [USER], special_tokens={}, template_kwargs={name: "y"})
    assert caught.value.param == "chat_template_kwargs"


def test_override_is_a_file_or_the_template_itself(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}")
    for value in (str(path), "{{ messages[0].content }}"):
        assert render(load_override(value), [USER], special_tokens={}) == "Hi"


@pytest.mark.parametrize("value", ["/no/such/file.jinja", "{% if %}"])
def test_a_bad_override_is_refused_at_start(value):
    with pytest.raises(CheckpointError, match="--chat-template"):
        load_override(value)


def test_transformers_generation_tag_is_allowed():
    load_override(
        "{% generation %}{{ messages }}{% endgeneration %}{% for m in messages %}{% endfor %}"
    )
