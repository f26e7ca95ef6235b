"""Chat templates of many kinds, each a whole one or the beginning of one."""

TURNS = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
"""Refuses a system message, as Gemma 2 does."""
ALTERNATING = (
    "{% if messages | length % 2 == 0 %}{{ raise_exception('roles must alternate') }}{% endif %}" + TURNS
)
"""Refuses it without a word about it, as Mistral 7B v0.1 does."""
CHOOSY = "{% if 'zebra' in messages[-1].content %}{{ raise_exception('no animals') }}{% endif %}"
"""Put before another: refuses some messages."""
