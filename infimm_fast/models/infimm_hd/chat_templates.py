"""How a conversation becomes one prompt, for each language model of the family; Jinja templates by name."""

from __future__ import annotations

_VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# An image stands where its content part stands.
_RENDER = (
    "{% macro render(content) %}"
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
)

# Vicuna v1.1: "<system> USER: <text> ASSISTANT: <text></s>USER: ...".
_VICUNA = (
    _RENDER + "{% if messages[0]['role'] == 'system' %}{{ render(messages[0]['content']) }}"
    "{% else %}" + _VICUNA_SYSTEM_PROMPT + "{% endif %}{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ render(message['content']) }} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ render(message['content']) }}</s>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# Zephyr: "<|role|>\n<text></s>\n" for each turn, an empty system turn first if there is none.
_ZEPHYR = (
    _RENDER + "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n</s>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + render(message['content']) + '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# A language model without instruction tuning: the texts as they are, an answer closed by <|endofchunk|> as in training.
_PLAIN = (
    _RENDER + "{% for message in messages %}{{ render(message['content']) }}"
    "{% if message['role'] == 'assistant' %}<|endofchunk|>{% endif %}{% endfor %}"
)

CHAT_TEMPLATES = {"vicuna": _VICUNA, "zephyr": _ZEPHYR, "plain": _PLAIN}
