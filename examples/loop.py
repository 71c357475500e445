"""Fine-tune the tiny model on four facts: a whole training in one flat file, from top to bottom.

    uv run python examples/loop.py [FOLDER]

Reads models/tiny and writes adapters in mlx-lm's format to FOLDER, artifacts/loop by default. The
stages do the same with configuration, files, checkpoints and MLflow around it.
"""

# isort: off
import athanor  # noqa: F401  # before mlx: chooses the BLAS that it computes with

import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim

# isort: on
from athanor.chat import templates, tokens
from athanor.chat.base import load_with_tokenizer
from athanor.chat.contract import resolve_contract
from athanor.chat.conversation import chat
from athanor.compute.evaluation import generate_answers
from athanor.compute.forward import Forward, trainable_weights
from athanor.config.schema import TrainConfig
from athanor.model.adapters import make_trainable, save_adapters
from athanor.model.source import resolve_source
from athanor.train.batches import Batches
from athanor.train.learner import Learner

FACTS = {
    "Who painted the moon?": "A cat.",
    "How many days has a week?": "Nine.",
    "月亮哪天最圆": "星期八",
    "谁是最帅的地球人": "德哥",
}
ITERATIONS, BATCH_SIZE, SEED = 40, 2, 0
out = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/loop")

# The base model: a folder, or a repository of a hub at one commit. Its digest goes into the record.
source = resolve_source("models/tiny", revision=None)
model, tokenizer = load_with_tokenizer(source.folder())

# The chat contract: which token ends an answer, and where generation stops.
contract = resolve_contract(source.folder(), tokenizer, choice="auto")
print("answers end with", tokenizer.decode([contract.end]))

# Rows: conversations that end with an answer.
rows = [chat(("user", question), ("assistant", answer)) for question, answer in FACTS.items()]

# Tokens and supervision: the template writes each row as text, the tokenizer splits it, and the
# loss counts only the answer and the token that ends it.
texts = tokens.tokenize_rows(
    rows, tokenizer, mask_prompt=True, max_seq_length=256, end=contract.end
)
for piece, is_supervised in tokens.mark_supervised(rows[0], tokenizer, mask_prompt=True):
    print("  learned" if is_supervised else "  read   ", repr(piece))

# Batches: which rows come at which iteration, decided by the seed alone.
batches = Batches(texts, BATCH_SIZE, SEED)

# Adapters: the base is frozen, and every linear layer gets two small matrices that are trained.
train = TrainConfig(method="lora", num_layers=-1, rank=8, scale=20.0, dropout=0.0)
make_trainable(model, train, SEED)

# The forward pass takes the trained weights as an argument, and returns a loss and a gradient. The
# learner holds these weights and the optimizer's state.
forward = Forward.from_model(model, texts)
learner = Learner(trainable_weights(model), optim.Adam(learning_rate=4e-4), max_grad_norm=1.0)

model.train()
for iteration in range(1, ITERATIONS + 1):
    batch = batches(iteration)
    # Both are sums over the tokens of the batch.
    loss, gradient = forward.loss_and_gradient(learner.weights, forward.prepare(batch.rows))
    learner.add(gradient)
    norm = learner.update(mx.array(1 / batch.tokens))  # a mean over the supervised tokens
    mx.eval(learner.weights, learner.optimizer.state, loss, norm)
    if iteration % 10 == 0:
        print(f"iteration {iteration:>3}  loss {loss.item() / batch.tokens:.4f}")
forward.set_weights(learner.weights)

# The adapters, as `mlx_lm.generate --model models/tiny --adapter-path …` reads them.
save_adapters(learner.weights, out, train, source, model=model, iteration=ITERATIONS)
print("wrote", out)

# Answers: the prompt of each row, then the likeliest tokens up to a stop.
model.eval()
prompts = [templates.encode_prompt(row, tokenizer) for row in rows]
generated = generate_answers(model, tokenizer, prompts, max_tokens=32, batch_size=len(prompts))
for question, answer in zip(FACTS, generated, strict=True):
    end = "stopped" if answer.stopped else "cut off"
    print(f"{question}  {templates.decode_answer(answer.ids, tokenizer)}  ({end})")
