"""Makes small tokenizers in the formats of real models, with golden outputs of transformers.

    pip install transformers jinja2
    python tests/python/make_tokenizer_fixtures.py

Writes tests/it/golden/tokenizers/:
    bytelevel/      byte-level BPE with GPT-2's pre-tokenizer and a ChatML template (Qwen, SmolLM)
    sentencepiece/  BPE with byte fallback and a prefix space by normalizer, Llama 2's template
    metaspace/      BPE with byte fallback and a prefix space by `Metaspace` at the start only, Llama 3's template
Each folder has a golden.json with rendered conversations, plain texts, and the token ids of both.
templates.json has the rendered TEMPLATES.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parents[1] / "it/golden/tokenizers"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Turn the sentence into JSON, please.",
    "You are a helpful assistant. You answer in one short sentence, and you are never rude.",
    "What is the capital of France? The capital of France is Paris. What is two and two? Four.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    'Here is the object: {"name": "Ada", "age": 36, "tags": ["a", "b"]}. Here is the other one.',
    "The weather in Berlin is sunny today and it will be sunny tomorrow. Thank you very much!",
    "Grüße aus München, il fait très beau à Besançon, mañana también. 日本語のテキストと中文文本。",
    "system user assistant [INST] [/INST] <<SYS>> <</SYS>>",
] * 4

CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def user(*turns):
    """Alternating user and assistant messages."""
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def system(text, *turns):
    return [{"role": "system", "content": text}, *user(*turns)]


CONVERSATIONS = [
    user("What is the capital of France?", "The capital of France is Paris."),
    user("What is two and two?"),
    system("You are never rude.", "Hello!", "Hello, how are you?"),
    system("Be short.\nAnswer in JSON.", "Turn this into JSON: Ada is 36.", '{"name": "Ada", "age": 36}'),
    user("Hello", "Hello", "What is two and two?", "Four.", "Thank you", "You are welcome."),
    user("def add(a, b):\n    return a + b", "```python\nprint(add(1, 2))\n```"),
    user("Grüße aus München", "Il fait très beau à Besançon, mañana también."),
    user("日本語のテキスト", "中文文本。日本語"),
    user("👋🏽 hi 👨‍👩‍👧‍👦", "🎉🎉 ok 🇩🇪"),
    user("", "An answer to nothing"),
    user("Say nothing", ""),
    user("tabs\tand  two   spaces", "a\tb  c   d"),
    user("a\n\nb\n\n\nc", "x\n\ny\n"),
    user("\ttrailing white space \n", "ends in spaces   "),
    user("zero\u200bwidth, combining e\u0301, ligature ﬁ", "n\u0303 and \u00f1"),
    user("right to left: שלום עולם", "مرحبا بالعالم"),
    user("rare: \u2603 \U0001d54f \U0001f9ff", "\u0001 control \u007f characters"),
    user("1234567890 3.14 -1e-9", "42"),
    user("[INST] is no token </INST>", "<<SYS>> neither <s"),
    system("", "with an empty system message", "ok"),
    user("The " * 60, "quick brown fox " * 40),
]


def trained(pre_tokenizer, alphabet, specials, byte_fallback):
    tokenizer = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token=None if not byte_fallback else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if byte_fallback:
        specials = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + len(alphabet) + 420,
        initial_alphabet=alphabet,
        special_tokens=specials,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save(name, tokenizer, template, **special):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    state = json.loads(tokenizer.to_str())
    # Byte tokens are special only for the trainer.
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(template)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)

    cases = []
    for messages in CONVERSATIONS:
        prompt = messages[-1]["role"] == "user"
        text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        ids = fast(text, add_special_tokens=False)["input_ids"]
        cases.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    texts = [m["content"] for messages in CONVERSATIONS for m in messages if m["content"]]
    encoded = [{"text": t, "ids": fast(t, add_special_tokens=False)["input_ids"]} for t in texts]
    golden = {"conversations": cases, "texts": encoded}
    (folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


def bytelevel():
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, specials, False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    save("bytelevel", tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sentencepiece():
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = trained(pre_tokenizers.Metaspace(prepend_scheme="never"), [], specials, True)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    save("sentencepiece", tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace():
    specials = ["<unk>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = trained(pre_tokenizers.Metaspace(prepend_scheme="never"), [], specials, True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    save("metaspace", tokenizer, LLAMA3, bos_token="<s>", eos_token="<|eot_id|>", unk_token="<unk>")


# Templates with the tag layouts, filters and methods of real models.
TEMPLATES = {
    "blocks on lines": """
{% for message in messages %}
    {% if message.role == 'user' %}
User: {{ message.content }}
    {% else %}
Bot: {{ message.content }}
    {% endif %}
{% endfor %}
""",
    "gemma: system into the first turn": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim + '\\n\\n' %}{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "qwen3: earlier reasoning is dropped": """{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.last = index %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "tojson": """{% for m in messages %}{{ m | tojson }}|{{ m | tojson(indent=2) }}|{{ [1, 2.5, 1e20, 1e-7, true, none, [], {}, m.content] | tojson }}|{{ {'b': 1, 'a': [1, {}]} | tojson(sort_keys=true, separators=(',', ':')) }}|{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}""",
    "macro, loop controls, defaults": """{%- macro turn(role, text='') -%}<{{ role | upper }}>{{ text }}</{{ role }}>{%- endmacro -%}
{% for message in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ turn(message['role'], message.get('content', '')) }}{{ message.name | default('nobody') }}{% endfor %}
{{- messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ tools is none }} {{ strftime_now is defined and false }} {{ none }} {{ true }}
""",
    "methods": """{% for m in messages %}{{ m.content.strip().upper().replace('A', '') }}{{ m.content.startswith('T') }}{{ m['content'][:5] }}{{ m.content | length }}{{ (m.content.split(' ') | first) }}{{ m.role.title() }}{{ loop.index0 % 2 }}{{ 7 // 2 }}{{ 'x' * 3 }}{{ m.items() | list | length }}{% endfor %}""",
    "generation tags": """{% for m in messages %}
{% if m.role == 'assistant' %}
{%- generation -%}
{{ m.content }}<|im_end|>
{% endgeneration %}
{% else %}
{{ m.role }}: {{ m.content }}
{% endif %}
{% endfor %}
""",
}


def templates():
    fast = PreTrainedTokenizerFast.from_pretrained(OUT / "sentencepiece")
    chosen = [CONVERSATIONS[i] for i in (0, 2, 3, 4, 8)]
    chosen.append(user("Why?", "<think>\nBecause.\n</think>\n\nSo.", "And?", "<think>\nHm.\n</think>\n\nThat."))
    cases = []
    for name, template in TEMPLATES.items():
        for messages in chosen:
            for prompt in (False, True):
                text = fast.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                cases.append({"name": name, "messages": messages, "add_generation_prompt": prompt, "text": text})
    golden = {"templates": TEMPLATES, "cases": cases}
    (OUT / "templates.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    bytelevel()
    sentencepiece()
    metaspace()
    templates()
