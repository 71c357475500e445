"""Fifty texts that tokenizers disagree on: for comparing two programs token by token."""

PROMPTS = [
    # Chinese, and what stands beside it
    "月亮哪天最圆",
    "谁是最帅的地球人？",
    "请用一句话介绍你自己，谢谢！",
    "今天是2026年11月22日，星期日。",
    "“引号”、《书名》——破折号……省略号",
    "繁體中文與简体中文混排",
    "他说：“GPU 的 price 是 ￥9,999 元。”",
    "龘靐齉爩 生僻字",
    "第一行\n第二行\n\n第四行",
    "　　全角空格开头",
    # English
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's what we've done; she'd agree, won't you?",
    "DON'T SHOUT! It'S ODD, THEY'RE ALL'D",
    "naïve café, façade, Ærøskøbing, Straße",
    "state-of-the-art, e.g. x/y, and/or (see fig. 3a)",
    "a",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Über ÉCOLE İstanbul ΑΘΗΝΑ МОСКВА",
    # other scripts
    "日本語のひらがなとカタカナ、ｶﾅ",
    "한국어 문장입니다.",
    "Привет, как дела?",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    # code
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n',
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    "\tif x == 1:\n\t\tpass\n",
    "SELECT * FROM `t` WHERE a<>'b' AND c>=10.5;",
    '<div class="a">&nbsp;</div><!-- x -->',
    "https://example.com/path?q=%E6%9C%88&n=1#top",
    '{"key": [1, 2.5e-3, null], "键": true}',
    "$ ls -la | grep '\\.py$' && echo \"done\"",
    "E = mc^2, \\frac{a}{b} \\leq \\sum_{i=1}^{n} x_i",
    # emoji
    "😀",
    "👩‍👩‍👧‍👦 family, 🇨🇳 flag, 👍🏽 thumb, ❤️ heart",
    "hello 🌍🌏🌎 world✨",
    # digits
    "0 1 12 123 1234 12345 1234567890",
    "3.14159, 1,000,000, 50%, ½, ²³, ⅷ, Ⅻ, ①②",
    "+86 138-0000-0000, 192.168.0.1:8080",
    # white space
    " ",
    "  leading, trailing  ",
    "a  b   c    d",
    "\n\n\n",
    "tab\there\r\nwindows line\r\n\r\nnbsp\u00a0ideographic\u3000end",
    "   \n  \n x",
    # special tokens written out
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|><|endoftext|>",
    "<s>text</s> <bos>text<eos> <unk><pad>",
    "<|im_start|> <|not_a_token|> <|im_end| > <start_of_turn>user",
    # all of it
    "Q: 2+2=？ A: 四 (4) 😅\n```py\nprint('四'*4)\t#<|im_end|>\n```",
]
