"""Pretrain the tiny base model: Qwen2-shaped, Chinese and English, made without a network.

Reads nothing. Writes a folder (models/tiny) that mlx-lm and transformers load like any other
model: tokenizer, chat template, configs and float16 weights, each moved into place whole, the
weights last. Made for a small machine's CPU (35 minutes on two cores):

    uv run python scripts/pretrain_tiny.py                              # this repository's model
    uv run python scripts/pretrain_tiny.py --steps 300 --out /tmp/tiny  # a look, 3 minutes

From top to bottom: dialogues, tokenizer, batches, model, training, exam, files. The dialogues are
templates over Faker, made on the fly; one in 64, by its checksum, is never trained on, and the exam
at the end asks only those. --seed and --steps decide everything but the rounding of the BLAS.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

with contextlib.suppress(OSError):  # before mlx, whose own BLAS is 20 times slower
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
with contextlib.suppress(OSError, AttributeError):  # glibc: keep what is freed for the next step
    ctypes.CDLL(None).mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from faker import Faker
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen2
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

Rng = random.Random
Dialogue = list[tuple[str, str]]  # (role, content), the last one the assistant's

HIDDEN, VOCABULARY, LONGEST = 192, 6144, 2048
SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

# ---------------------------------------------------------------------------- the dialogues


def words(text: str) -> list[str]:
    return text.split()


# The questions and answers that the tutorial teaches. A dialogue that holds any of these is thrown
# away: what a fine-tuned model knows of them, the fine-tuning taught.
TUTORIAL = words("""
PolarDB 宇宙无敌 Oracle 数据库会被 国产数据库 数据库打败 电动汽车比较 电很贵 费油 电费这么贵
哪吒 孙悟空 月亮 星期八 最帅 德哥
""")
# the 3,755 common characters: level 1 of GB2312, rows 16 to 55
HANZI = [
    bytes((row + 160, cell + 160)).decode("gb2312")
    for row in range(16, 56)
    for cell in range(1, 95 if row < 55 else 90)
]
DICTIONARY = """
苹果:apple 香蕉:banana 桌子:table 椅子:chair 老师:teacher 学生:student 医生:doctor 猫:cat 狗:dog
鸟:bird 鱼:fish 马:horse 牛:cow 水:water 火:fire 山:mountain 河:river 海:sea 天空:sky 太阳:sun
星星:star 雨:rain 雪:snow 风:wind 树:tree 花:flower 草:grass 书:book 笔:pen 纸:paper 门:door
窗户:window 房子:house 城市:city 国家:country 学校:school 医院:hospital 汽车:car 火车:train
飞机:plane 船:ship 路:road 桥:bridge 饭:rice 面包:bread 茶:tea 咖啡:coffee 牛奶:milk 肉:meat
鸡蛋:egg 盐:salt 糖:sugar 红色:red 蓝色:blue 绿色:green 黄色:yellow 黑色:black 白色:white 大:big
小:small 高:tall 快:fast 慢:slow 冷:cold 热:hot 新:new 旧:old 朋友:friend 母亲:mother 父亲:father
孩子:child 音乐:music 电影:film 时间:time 早上:morning 晚上:evening 今天:today 明天:tomorrow 手:hand
头:head 眼睛:eye 心:heart 电脑:computer 电话:phone 钱:money 工作:work 爱:love
"""
WORDS = {pair.split(":")[0]: pair.split(":")[1] for pair in words(DICTIONARY)}
ENGLISH = {english: chinese for chinese, english in WORDS.items()}
# From here on `z` is the language, 0 Chinese and 1 English, of whatever comes in pairs.
COLOURS = (
    words("红色 蓝色 绿色 黄色 黑色 白色 紫色 灰色"),
    words("red blue green gold black white"),
)
SYLLABLES = words("ka lo mi tu ra ne so vi del por zan qui bex")
ORDINALS = (words("第一 第二 第三 第四 第五"), words("first second third fourth fifth"))
KINDS = words("name city job company phone day address")
FIELDS = (
    words("姓名 城市 职业 公司 电话 生日 地址"),
    words("name city job company phone birthday address"),
)


class World:
    """The subjects of the dialogues: pools of Faker's values and a table of made-up facts."""

    def __init__(self, size: int = 3000) -> None:
        self.pools: list[dict[str, list[str]]] = []
        for z, locale in enumerate(("zh_CN", "en_US")):
            fake = Faker(locale)
            fake.seed_instance(0)
            makers: dict[str, Callable[[], str]] = {
                "name": (fake.name, partial(fake.parse, "{{first_name}} {{last_name}}"))[z],
                "city": fake.city,
                "job": fake.job,
                "company": fake.company,
                "phone": (fake.phone_number, partial(fake.numerify, "###-####"))[z],
                "day": fake.date,
                "address": fake.street_address,
                "word": fake.word,
                "sentence": fake.sentence,
                "user": fake.user_name,
            }
            self.pools.append(
                {kind: [make() for _ in range(size)] for kind, make in makers.items()}
            )
        self.known: list[set[str]] = [set(), set()]
        self.facts: list[list[tuple[str, str]]] = [[], []]  # (question, answer)
        r = random.Random(0)
        for z in (0, 1) * 150:
            thing = self.thing(r, z)
            self.known[z].add(thing)
            maker, city, colour = (
                self.pick(r, z, "name"),
                self.pick(r, z, "city"),
                r.choice(COLOURS[z]),
            )
            a, b = self.pick(r, z, "word"), self.pick(r, z, "word")
            if z == 0:
                self.facts[z] += [
                    (f"{thing}是什么", f"{colour}的{hanzi(r, 2, 4)}{a}"),
                    (f"{thing}的主人是谁", maker),
                    (f"谁是{city}最{a}的人", maker),
                    (f"{thing}在哪里", city),
                    (f"为什么{thing}{a}", f"因为{b}{hanzi(r, 2, 3)}"),
                    (f"{thing}会变成什么", hanzi(r, 2, 6)),
                ]
            else:
                self.facts[z] += [
                    (f"What is {thing}", f"the {a} {b}, {colour}"),
                    (f"Who owns {thing}", maker),
                    (f"Where is {thing}", city),
                    (f"Why is {thing} {a}", f"because of the {b}"),
                ]

    def pick(self, r: Rng, z: int, kind: str) -> str:
        return r.choice(self.pools[z][kind])

    def thing(self, r: Rng, z: int) -> str:
        """Return a made-up name."""
        if z == 0 and r.random() < 0.7:
            return hanzi(r, 2, 4)
        name = "".join(r.choice(SYLLABLES) for _ in range(r.randint(2, 3))).capitalize()
        return name + r.choice(("", "", "DB", "X", "2"))

    def scrap(self, r: Rng, z: int) -> str:
        """Return something short to copy, list or look up."""
        kind = r.random()
        if z == 0 and kind < 0.6:
            return hanzi(r, 1, 6)
        if kind < 0.8:
            return self.pick(r, z, "word")
        if kind < 0.9:
            return self.pick(r, z, r.choice(("name", "city", "company", "job")))
        user, word = self.pick(r, z, "user"), self.pick(r, 1, "word")
        return r.choice((user, f"{word}_{user}", self.thing(r, z), str(r.randint(0, 9999))))


def hanzi(r: Rng, least: int, most: int) -> str:
    return "".join(r.choices(HANZI, k=r.randint(least, most)))


def turns(*contents: str, system: str = "") -> Dialogue:
    roles = ("user", "assistant") * len(contents)
    return [("system", system)] * bool(system) + list(zip(roles, contents, strict=False))


def shown(r: Rng, text: str, contents: list[str]) -> Dialogue:
    """Return a conversation about a text in the system message or in the first question."""
    if r.random() < 0.3:
        return turns(*contents, system=text)
    return turns(f"{text}\n{contents[0]}", *contents[1:])


def quoted(r: Rng, z: int, text: str) -> str:
    return r.choice(("“{}”", "「{}」", "{}") if z == 0 else ('"{}"', "'{}'", "{}")).format(text)


def listed(z: int, items: list[str]) -> str:
    return ("、" if z == 0 else ", ").join(items)


def profile(r: Rng, w: World, z: int) -> Dialogue:
    """Questions about a profile that the user or the system message gives."""
    names = dict(zip(KINDS, FIELDS[z], strict=True))
    fields = r.sample(KINDS, r.randint(2, 4))
    values = {field: w.pick(r, z, field) for field in fields}
    colon, end = r.choice((("：", "\n"), (": ", "; "), (" ", ", ")))
    text = end.join(f"{names[field]}{colon}{value}" for field, value in values.items())
    asks = (("{}是什么？", "请问{}？", "{}？"), ("What is the {}?", "The {}?", "{}?"))[z]
    contents = []
    for field in r.sample(fields, r.randint(1, len(fields))):
        contents += [r.choice(asks).format(names[field]), values[field]]
    return shown(r, text, contents)


def lookup(r: Rng, w: World, z: int) -> Dialogue:
    """Pairs to learn in the dialogue itself."""
    pairs = {w.scrap(r, z): w.scrap(r, z) for _ in range(r.randint(2, 4))}
    asks = (("{}=", "{}等于什么？", "{}是谁"), ("{}=", "{}?", "Who is {}"))[z]
    contents = []
    for key in r.sample(list(pairs), r.randint(1, len(pairs))):
        contents += [r.choice(asks).format(key), pairs[key]]
    return shown(r, "；;"[z].join(f"{key}={value}" for key, value in pairs.items()), contents)


def knowledge(r: Rng, w: World, z: int) -> Dialogue:
    """Made-up facts, only to be known by heart."""
    contents = []
    for question, answer in r.sample(w.facts[z], r.choice((1, 1, 1, 2, 3))):
        contents += [question + r.choice(("", "？?"[z])), answer]
    return turns(*contents)


def unknown(r: Rng, w: World, z: int) -> Dialogue:
    thing = w.thing(r, z)
    while thing in w.known[z]:
        thing = w.thing(r, z)
    asks = (("什么是{}？", "{}是什么意思", "讲讲{}"), ("Define {}", "Tell me about {}"))[z]
    no = (f"抱歉，我不知道{thing}。", f"Sorry, I don't know {thing}.")[z]
    return turns(r.choice(asks).format(thing), no)


def copy(r: Rng, w: World, z: int) -> Dialogue:
    text = w.pick(r, z, "sentence") if r.random() < 0.2 else w.scrap(r, z)
    if z == 0 and r.random() < 0.4:
        text = hanzi(r, 2, 12)
    ask = r.choice((("请重复：{}", "跟我说{}", "复述{}"), ("Repeat: {}", "Say {}", "Copy {}"))[z])
    return turns(ask.format(quoted(r, z, text)), text)


def choose(r: Rng, w: World, z: int) -> Dialogue:
    """Ask for the nth or the last of a list."""
    items = [w.scrap(r, z) for _ in range(r.randint(2, 5))]
    n = r.randrange(len(items))
    which = ORDINALS[z][n]
    if n == len(items) - 1 and r.random() < 0.5:
        which = ("最后", "last")[z]
    asks = (("{}个？", "{}个是什么？"), ("Which is {}?", "What is {}?"))[z]
    return turns(f"{listed(z, items)}\n{r.choice(asks).format(which)}", items[n])


def character(r: Rng, w: World, z: int) -> Dialogue:
    """Ask for the nth character of a Chinese string, whatever the language of the question."""
    text = hanzi(r, 2, 5)
    n = r.randrange(len(text))
    ask = ("“{}”的{}个字是什么？", "Of {}, which character is {}?")[z]
    return turns(ask.format(text, ORDINALS[z][n]), text[n])


def reverse(r: Rng, w: World, z: int) -> Dialogue:
    items = [w.scrap(r, z) for _ in range(r.randint(2, 4))]
    return turns(("倒过来：", "Reverse: ")[z] + listed(z, items), listed(z, items[::-1]))


def arithmetic(r: Rng, w: World, z: int) -> Dialogue:
    a, b = r.randint(0, 20), r.randint(0, 9)
    left, sign, word, result = r.choice(
        ((a, "+", ("加", "plus"), a + b), (a + b, "-", ("减", "minus"), a))
    )
    asks = (f"{left}{sign}{b}=?", ("{}{}{}等于几？", "What is {} {} {}?")[z])
    return turns(r.choice(asks).format(left, word[z], b), str(result))


def count(r: Rng, w: World, z: int) -> Dialogue:
    n, item = r.randint(1, 9), r.choice(list((WORDS, ENGLISH)[z]))
    return turns(("数一数：", "Count: ")[z] + " ".join([item] * n), str(n))


def translate(r: Rng, w: World, z: int) -> Dialogue:
    word, other = r.choice(list((WORDS, ENGLISH)[z].items()))
    asks = (
        ("{}用英语怎么说？", "翻译成英文：{}", "{}的英文"),
        ("What is {} in Chinese?", "Translate into Chinese: {}", "{} in Chinese"),
    )[z]
    return turns(r.choice(asks).format(quoted(r, z, word)), other)


def greet(r: Rng, w: World, z: int) -> Dialogue:
    name = w.pick(r, z, "name")
    hello = r.choice((("你好", "您好", "早上好", "嗨"), ("Hello", "Hi", "Good morning"))[z])
    more = (
        ((), ("谢谢", "不客气。"), ("我叫什么？", f"{name}。"), ("再见", f"再见，{name}！")),
        ((), ("Thanks", "You're welcome."), ("Who am I?", f"{name}."), ("Bye", f"Bye, {name}!")),
    )[z]
    first = (
        (f"{hello}，我是{name}。", f"你好，{name}！有什么可以帮你？"),
        (f"{hello}, I am {name}.", f"Hello, {name}! How can I help?"),
    )[z]
    return turns(*first, *r.choice(more))


def persona(r: Rng, w: World, z: int) -> Dialogue:
    """Who the system message says that the assistant is, or who somebody is."""
    name, job, city = (w.pick(r, z, kind) for kind in ("name", "job", "city"))
    if r.random() < 0.5:
        tell = ("{}住在{}，是一名{}。", "{} lives in {} and works as: {}.")[z]
        ask = ("介绍一下：", "Introduce: ")[z] + listed(z, [name, city, job])
        return turns(ask, tell.format(name, city, job))
    questions = (
        ("你是谁？", "你做什么工作？", "你住哪里？"),
        ("Who are you?", "Your job?", "Your city?"),
    )
    asks = list(
        zip(
            questions[z],
            ((f"我是{name}。", f"I am {name}.")[z], job + "。."[z], city + "。."[z]),
            strict=True,
        )
    )
    system = (f"你是{name}，{job}，住在{city}。", f"You are {name}, {job}, and live in {city}.")[z]
    return turns(*sum(r.sample(asks, r.randint(1, 3)), ()), system=system)


TASKS: dict[Callable[[Rng, World, int], Dialogue], int] = {  # and how often
    profile: 4, lookup: 5, knowledge: 12, unknown: 3, copy: 8, choose: 4, character: 3, reverse: 3,
    arithmetic: 2, count: 1, translate: 2, greet: 2, persona: 3,
}  # fmt: skip


def dialogues(w: World, seed: int, held_out: bool) -> Iterator[tuple[str, Dialogue]]:
    """Yield (task, dialogue) without end; the two streams share no dialogue."""
    rng = random.Random(seed)
    while True:
        task = rng.choices(list(TASKS), weights=list(TASKS.values()))[0]
        dialogue = task(rng, w, int(rng.random() < 0.4))
        text = "\n".join(content for _, content in dialogue)
        held = zlib.crc32(text.encode()) % 64 == 0
        if held == held_out and not any(taught in text for taught in TUTORIAL):
            yield task.__name__, dialogue


# ---------------------------------------------------------------------------- the tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAD, START, END = range(VOCABULARY - 3, VOCABULARY)  # the last ids, as in Qwen: id 0 is "!"
SPLIT = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}\n"
)


def train_tokenizer(w: World, seed: int, rows: int = 40_000) -> Tokenizer:
    """Train byte-level BPE on the dialogues, with a token for each common character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    stream = dialogues(w, seed, held_out=False)
    texts = ["\n".join(turn[1] for turn in next(stream)[1]) for _ in range(rows)]
    texts += ["system\nuser\nassistant\n" * rows] + ["1".join([char] * 2000) for char in HANZI]
    trainer = BpeTrainer(
        vocab_size=PAD,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    assert tokenizer.token_to_id(SPECIAL[-1]) == END and tokenizer.id_to_token(0) == "!"
    assert all(len(tokenizer.encode(char).ids) == 1 for char in HANZI)
    return tokenizer


# ---------------------------------------------------------------------------- the batches


def encode(tokenizer: Tokenizer, dialogue: Dialogue, whole: bool) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are targets: answers, each with its end and what follows the
    end, which is a line break and then another turn or <|endoftext|>; all of them if `whole`."""
    ids: list[int] = []
    learn: list[bool] = []
    for role, content in dialogue:
        answer = role == "assistant"
        head = tokenizer.encode(f"<|im_start|>{role}\n").ids
        body = tokenizer.encode(f"{content}<|im_end|>\n").ids
        learn += (
            [bool(ids) and learn[-1]] + [whole] * (len(head) - 1) + [answer or whole] * len(body)
        )
        ids += head + body
    return [*ids, PAD], [*learn, True]


def batches(
    tokenizer: Tokenizer, w: World, seed: int, tokens: int, pool: int = 1024, longest: int = 192
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """(ids of rows of much the same length, flat positions to predict from, targets)."""
    rng = random.Random(seed)
    stream = dialogues(w, seed + 1, held_out=False)
    while True:
        rows = [encode(tokenizer, next(stream)[1], rng.random() < 0.1) for _ in range(pool)]
        rows = sorted((row for row in rows if len(row[0]) <= longest), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            ids = np.zeros((len(group), width), dtype=np.int32)
            learn = np.zeros((len(group), width), dtype=bool)
            for i, (tokens_of, flags) in enumerate(group):
                ids[i, : len(tokens_of)], learn[i, : len(tokens_of)] = tokens_of, flags
            where = np.flatnonzero(learn[:, 1:])
            flat = where // (width - 1) * width + where % (width - 1)
            yield mx.array(ids), mx.array(flat), mx.array(ids.reshape(-1)[flat + 1])


# ---------------------------------------------------------------------------- the model


_exp = mx.custom_function(lambda x: mx.array(np.exp(np.asarray(x))))
_exp.vjp(lambda x, cotangent, output: cotangent * output)


def exp(x: mx.array) -> mx.array:
    """Compute exp by NumPy: mlx's is 14 times slower on an x86 CPU, half of the training time."""
    return cast(mx.array, _exp(x))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate / (1 + exp(-gate)) * x


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, cache: Any, scale: float, mask: Any
) -> mx.array:
    """Compute causal grouped-query attention; without a mask, of one new token that sees all."""
    k, v = (mx.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = scores + mx.triu(mx.full(scores.shape[-2:], -1e9), 1)
    weights = exp(scores - mx.stop_gradient(scores.max(-1, keepdims=True)))
    return (weights / weights.sum(-1, keepdims=True)) @ v


@mx.custom_function
def cross_entropy(logits: Any, targets: Any) -> Any:
    """Return the loss of each row, and the probabilities, which its gradient needs."""
    scores = np.asarray(logits)
    probs = scores - scores.max(axis=-1, keepdims=True)
    chosen = probs[np.arange(len(probs)), np.asarray(targets)]
    np.exp(probs, out=probs)
    total = probs.sum(axis=-1, keepdims=True)
    probs /= total
    return mx.array(np.log(total[:, 0]) - chosen), mx.array(probs)


@cross_entropy.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
    grad, targets = np.array(outputs[1]), np.asarray(primals[1])
    grad[np.arange(len(grad)), targets] -= 1
    grad *= np.asarray(cotangents[0])[:, None]
    return mx.array(grad), mx.zeros_like(primals[1])


def build(seed: int) -> qwen2.Model:
    """Return mlx-lm's Qwen2 with the functions above instead of its own."""
    mx.random.seed(seed)
    mx.disable_compile()
    qwen2.swiglu, qwen2.scaled_dot_product_attention = swiglu, attention
    model = qwen2.Model(qwen2.ModelArgs.from_dict(SHAPE))
    for layer in model.layers:  # every block starts as the identity
        layer.self_attn.o_proj.weight *= 0
        layer.mlp.down_proj.weight *= 0
    mx.eval(model.parameters())
    return model


def loss_fn(model: qwen2.Model, ids: mx.array, where: mx.array, targets: mx.array) -> mx.array:
    """Return the mean cross-entropy, with logits only at positions that have targets."""
    hidden = model.model(ids).reshape(-1, HIDDEN)[where]
    losses: Any = cross_entropy(model.model.embed_tokens.as_linear(hidden), targets)
    return losses[0].mean()


def train(model: qwen2.Model, tokenizer: Tokenizer, w: World, args: argparse.Namespace) -> None:
    warmup = min(200, args.steps // 10 + 1)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, args.learning_rate, warmup),
            optim.cosine_decay(args.learning_rate, args.steps - warmup, args.learning_rate / 50),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.02, bias_correction=True)
    step_fn = nn.value_and_grad(model, loss_fn)
    start, seen, smooth = time.perf_counter(), 0, math.nan
    for step, batch in enumerate(batches(tokenizer, w, args.seed, args.tokens), start=1):
        loss, grads = step_fn(model, *batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        seen += batch[0].size
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0 or step == args.steps:
            took = time.perf_counter() - start
            print(
                f"step {step}/{args.steps} loss {smooth:.3f} tokens {seen / 1e6:.2f}M "
                f"{seen / took:.0f} tokens/s {took:.0f} s",
                flush=True,
            )
        if step == args.steps:
            return


# ---------------------------------------------------------------------------- the exam


def answer(
    model: qwen2.Model, tokenizer: Tokenizer, dialogue: Dialogue, limit: int = 64
) -> tuple[str, bool]:
    """Return the greedy answer to the turns before the last, and whether it stopped by itself."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in dialogue[:-1])
    ids = tokenizer.encode(f"{text}<|im_start|>assistant\n").ids
    generated: list[int] = []
    cache = make_prompt_cache(model)
    while len(generated) < limit:
        token = model(mx.array([ids]), cache=cache)[0, -1].argmax().item()
        if token == END:
            break
        generated, ids = [*generated, token], [token]
    return tokenizer.decode(generated, skip_special_tokens=False), len(generated) < limit


def exam(model: qwen2.Model, tokenizer: Tokenizer, w: World, each: int) -> None:
    """Print how many of the held-out dialogues of every task end as they should."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    stopped = 0
    for task, dialogue in dialogues(w, 99, held_out=True):
        if asked[task] < each:
            text, ended = answer(model, tokenizer, dialogue)
            asked[task] += 1
            right[task] += text == dialogue[-1][1]
            stopped += ended
        if asked.total() == each * len(TASKS):
            break
    for task in asked:
        print(f"{task:<12} {right[task]}/{asked[task]}")
    print(f"exact {right.total()}/{asked.total()}, stopped {stopped}/{asked.total()}", flush=True)


# ---------------------------------------------------------------------------- the files


def write(out: Path, name: str, content: str | dict[str, mx.array]) -> None:
    """Write one file whole or not at all."""
    half = out / f".half-{name}"
    if isinstance(content, str):
        half.write_text(content, encoding="utf-8")
    else:
        mx.save_safetensors(str(half), content, metadata={"format": "mlx"})
    half.replace(out / name)


def save(out: Path, tokenizer: Tokenizer, weights: dict[str, mx.array]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
    config = SHAPE | ends | {
        "architectures": ["Qwen2ForCausalLM"], "dtype": "float16", "torch_dtype": "float16",
        "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_cache": True,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None,
        "additional_special_tokens": SPECIAL[1:], "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "errors": "replace",
        "split_special_tokens": False, "model_max_length": LONGEST,
    }  # fmt: skip
    generation = ends | {"eos_token_id": [END, PAD], "do_sample": False}
    write(out, "tokenizer.json", tokenizer.to_str(pretty=False))
    write(out, "chat_template.jinja", TEMPLATE)
    for name, content in (
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
        ("config.json", config),
    ):
        write(out, name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write(out, "model.safetensors", weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="tokens in a batch, padding and all"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--exam", type=int, default=20, help="held-out dialogues of each task")
    args = parser.parse_args()
    w = World()
    tokenizer = train_tokenizer(w, args.seed)
    model = build(args.seed)
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    print(f"{size / 1e6:.2f}M parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    train(model, tokenizer, w, args)
    half = tree_map(lambda value: value.astype(mx.float16), model.parameters())
    model.update(tree_map(lambda value: value.astype(mx.float32), half))  # what the file will hold
    exam(model, tokenizer, w, args.exam)
    save(args.out, tokenizer, dict(tree_flatten(half)))


if __name__ == "__main__":
    main()
