"""Chat templates in the manner of well-known models, and next to each what it renders, piece by piece.

A piece is (text, whether it is an assistant's). A turn's pieces end with its end-of-turn token and the blanks that the
template puts behind it when the conversation stops there. `{% generation %}` stands in none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

Pieces = list[tuple[str, bool]]
EOS = "</s>"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A template, and its literal reference."""

    template: str
    pieces: Callable[[list[dict]], Pieces]
    system: bool = True  # whether it shows one


def _turns(header: Callable[[str], str], footer: str, trim: bool = False) -> Callable[[list[dict]], Pieces]:
    """Header, content and footer of every message; the answer and its footer are the assistant's."""

    def pieces(messages: list[dict]) -> Pieces:
        found = []
        for message in messages:
            content = message["content"].strip() if trim else message["content"]
            found += [(header(message["role"]), False), (content + footer, message["role"] == "assistant")]
        return found

    return pieces


def _last_question(messages: list[dict]) -> int:
    return max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)


def _qwen3(messages: list[dict]) -> Pieces:
    found = []
    for number, message in enumerate(messages):
        assistant = message["role"] == "assistant"
        thinking = "<think>\n\n</think>\n\n" if assistant and number > _last_question(messages) else ""
        found += [
            (f"<|im_start|>{message['role']}\n", False),
            (thinking + message["content"] + "<|im_end|>\n", assistant),
        ]
    return found


def _llama3(messages: list[dict]) -> Pieces:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    return [("<s>", False), *_turns(header, "<|eot_id|>", trim=True)(messages)]


def _gemma(messages: list[dict]) -> Pieces:
    system, rest = (
        (messages[0]["content"] + "\n\n", messages[1:]) if messages[0]["role"] == "system" else ("", messages)
    )
    found = [("<s>", False)]
    for number, message in enumerate(rest):
        assistant = message["role"] == "assistant"
        found.append((f"<start_of_turn>{'model' if assistant else 'user'}\n" + (system if number == 0 else ""), False))
        found.append((message["content"].strip() + "<end_of_turn>\n", assistant))
    return found


def _mistral(messages: list[dict]) -> Pieces:
    system, rest = (
        (messages[0]["content"] + "\n\n", messages[1:]) if messages[0]["role"] == "system" else ("", messages)
    )
    found = [("<s>", False)]
    for number, message in enumerate(rest):
        if message["role"] == "assistant":
            found.append((" " + message["content"].strip() + EOS, True))
        else:
            shown = system if number == _last_question(rest) else ""
            found.append((f"[INST] {shown}{message['content']} [/INST]", False))
    return found


def _phi3(messages: list[dict]) -> Pieces:
    found = _turns("<|{}|>\n".format, "<|end|>\n")(messages)
    return [*found, (EOS, messages[-1]["role"] == "assistant")]


def _zephyr(messages: list[dict]) -> Pieces:
    return _turns("<|{}|>\n".format, EOS + "\n")(messages)


def _plain(messages: list[dict]) -> Pieces:
    header = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    return _turns(lambda role: header[role], "\n")(messages)


def _joined(messages: list[dict]) -> Pieces:
    found = []
    for number, message in enumerate(messages):
        name = {"system": "System", "user": "Human", "assistant": "AI"}[message["role"]]
        found += [(("\n\n" if number else "") + name + ": ", False)]
        found += [(message["content"].strip(), message["role"] == "assistant")]
    return found


def _endings_inside(messages: list[dict]) -> Pieces:
    """The end-of-turn token stands before the next user's header, and at the end; not behind questions."""
    found = []
    for number, message in enumerate(messages):
        assistant = message["role"] == "assistant"
        found += [("### Response:\n" if assistant else f"### {message['role']}:\n", False)]
        found += [(message["content"] + (EOS if assistant else ""), assistant)]
        found += [("\n\n", False)] if number < len(messages) - 1 else []
    return found


TEMPLATES = {
    "chatml": Written(
        template="{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        pieces=_turns("<|im_start|>{}\n".format, "<|im_end|>\n"),
    ),
    "qwen3": Written(
        template="{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1].lstrip('\\n') "
        "if '</think>' in m.content else m.content %}"
        "{% if loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ content }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
        pieces=_qwen3,
    ),
    "llama3": Written(
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        pieces=_llama3,
    ),
    "gemma": Written(
        template="{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        pieces=_gemma,
    ),
    "mistral": Written(
        template="{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
        "{% set ns = namespace(seen=0) %}{% for m in rest %}{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}"
        "{{ '[INST] ' }}{% if ns.seen == users | length %}{{ system }}{% endif %}{{ m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        pieces=_mistral,
    ),
    "phi3": Written(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        pieces=_phi3,
    ),
    "zephyr": Written(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
        pieces=_zephyr,
    ),
    "plain": Written(
        template="{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + '\\n' }}{% else %}{{ m.content + '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
        pieces=_plain,
    ),
    "joined": Written(
        template="{% set names = {'system': 'System', 'user': 'Human', 'assistant': 'AI'} %}"
        "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "{{ names[m.role] + ': ' + m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAI: ' }}{% endif %}",
        pieces=_joined,
    ),
    "instruct": Written(
        template="{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '### Response:\\n' + m.content + eos_token }}"
        "{% else %}{{ '### ' + m.role + ':\\n' + m.content }}{% endif %}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}",
        pieces=_endings_inside,
    ),
}


# --- templates built from parts --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A template of a header, a cut of blanks and a footer around every content; `pieces` says what it renders.

    Attributes:
        header: before each content, with {} for the role.
        footers: behind contents of (users and systems, the assistant).
        cut: a filter of the contents.
        between: between two messages, of nobody's turn.
        end: behind the last message, where no generation prompt follows; the last turn's.
        thinking: behind the generation prompt; `everywhere`: and behind the header of the last answer.
        system: "own turn", or hoisted into the "first" or "last" question.
    """

    header: str
    footers: tuple[str, str]
    cut: str
    between: str
    end: str
    prompted: bool
    thinking: str
    system: str

    def pieces(self, messages: list[dict]) -> Pieces:
        hoisted = self.system != "own turn" and messages[0]["role"] == "system"
        rest = messages[1:] if hoisted else messages
        users = [n for n, message in enumerate(rest) if message["role"] == "user"]
        shown_in = (users or [-1])[0 if self.system == "first" else -1] if hoisted else None
        found: Pieces = [("<s>", False)]
        for number, message in enumerate(rest):
            own = message["role"] == "assistant"
            content = getattr(message["content"], self.cut)() if self.cut else message["content"]
            generated = (
                own and not self.prompted and number > 0
            )  # without a generation prompt; but no prompt, no answer
            found.append((self.between if number else "", generated))
            found.append((self.header.format(message["role"]), generated))
            found.append((self.thinking if own and self.prompted and number == len(rest) - 1 else "", False))
            found.append((messages[0]["content"] + "\n\n" if number == shown_in else "", False))
            found.append((content + self.footers[own], own))
        return [*found, (self.end, rest[-1]["role"] == "assistant")]

    @property
    def template(self) -> str:
        def text(part: str) -> str:
            return "'" + part.replace("\n", "\\n").replace("{}", "' + role + '") + "'"

        cut = {"": "m.content", "strip": "m.content | trim"}.get(self.cut, f"m.content.{self.cut}()")
        number = {"own turn": "-1", "first": "users[0]", "last": "users[-1]"}[self.system]
        return (
            "{{ bos_token }}{% set hoisted = " + str(self.system != "own turn") + " and messages[0].role == 'system' %}"
            "{% set rest = messages[1:] if hoisted else messages %}{% set ns = namespace(users=[]) %}"
            "{% for m in rest %}{% if m.role == 'user' %}{% set ns.users = ns.users + [loop.index0] %}"
            "{% endif %}{% endfor %}{% set users = ns.users or [-1] %}"
            "{% for m in rest %}{% set role = m.role %}{% if not loop.first %}{{ " + text(self.between) + " }}{% endif %}"
            "{{ " + text(self.header) + " }}"
            "{% if loop.last and role == 'assistant' and " + str(self.prompted) + " %}"
            "{{ " + text(self.thinking) + " }}{% endif %}"
            "{% if hoisted and loop.index0 == " + number + " %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
            "{{ " + cut + " }}{{ " + text(self.footers[1]) + " if role == 'assistant' else " + text(self.footers[0]) + " }}"
            "{% endfor %}{% set role = 'assistant' %}{% if not add_generation_prompt %}{{ " + text(self.end) + " }}"
            "{% elif " + str(self.prompted) + " %}{{ " + text(self.between + self.header + self.thinking) + " }}{% endif %}"
        )  # fmt: skip


_HEADERS = st.sampled_from(["<|{}|>", "<|{}|>\n", "<|im_start|>{}\n", "\n\n{}: ", "### {}:\n"])
_FOOTERS = st.sampled_from(["<|end|>", "<|im_end|>\n", "</s>", "\n", ""])


def random_parts() -> st.SearchStrategy[Parts]:
    return st.builds(
        Parts,
        header=_HEADERS,
        footers=st.tuples(_FOOTERS, _FOOTERS),
        cut=st.sampled_from(["", "strip", "rstrip", "lstrip"]),
        between=st.sampled_from(["", "", "\n"]),
        end=st.sampled_from(["", "", "</s>"]),
        prompted=st.sampled_from([True, True, True, False]),
        thinking=st.sampled_from(["", "", "<think>\n\n</think>\n\n"]),
        system=st.sampled_from(["own turn", "first", "last"]),
    )
