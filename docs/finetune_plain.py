# %% [markdown]
# # Fine-tune a pretrained backbone in plain PyTorch
#
# Load an export, look at what its features know, and train it further on a task of one's own: which colour is a
# glyph drawn in?  No Lightning, no `mmssl fit`: a loop that can be taken into any project.
#
# It needs the demo's data and a backbone, and takes seconds on a CPU:
#
# ```bash
# make demo                                            # or tools/make_demo_data.py and a shorter mmssl fit
# mmssl export runs/demo --out exports/demo
# python docs/finetune_plain.py
# ```
#
# Its cells run one by one in VS Code, PyCharm and Spyder; `jupytext --to notebook docs/finetune_plain.py` makes a
# notebook of them.

# %%
import io
import tarfile
import time

import PIL.Image
import torch
import torch.nn.functional as F

import mmssl

BACKBONE = "exports/demo"  # or a run's folder, a checkpoint, owner/name on the Hugging Face hub
TRAIN, TEST = "data/demo/pairs-train-000000.tar", "data/demo/pairs-val-000000.tar"
COLOURS = {"white", "black", "gray", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"}

torch.manual_seed(0)
began = time.monotonic()

# %% [markdown]
# ## Pictures and labels
#
# Shards are plain tars: `000000012.jpg` and `000000012.txt` are a picture and its caption.  The first colour that a
# caption names is that of the ink, which is the label.  The pictures of the test set show characters that pretraining
# never saw.


# %%
def read(shard: str, count: int) -> tuple[list[PIL.Image.Image], list[str]]:
    """The first pictures of a shard, with their captions."""
    pictures, captions = {}, {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension in ("jpg", "png"):
                pictures[key] = PIL.Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            elif extension == "txt":
                captions[key] = tar.extractfile(member).read().decode()
            if len(pictures) == len(captions) == count:
                break
    return list(pictures.values()), [captions[key] for key in pictures]


def ink(caption: str) -> str:
    """The first colour that is named."""
    return "dark blue" if caption.startswith("dark blue") else next(word for word in caption.split() if word in COLOURS)


train_pictures, train_captions = read(TRAIN, 500)
test_pictures, test_captions = read(TEST, 300)
classes = sorted({ink(caption) for caption in train_captions})
train_labels = torch.tensor([classes.index(ink(caption)) for caption in train_captions])
test_labels = torch.tensor([classes.index(ink(caption)) for caption in test_captions])
chance = (test_labels.bincount().max() / len(test_labels)).item()
print(f"{len(train_labels)} pictures to train on, {len(test_labels)} to test, for example: {test_captions[0]!r}")

# %% [markdown]
# ## Load and encode
#
# `encode_image` takes pictures as they are and prepares them as in validation: there is nothing to get wrong.
# Without `torch.no_grad()` it would keep what a backward pass needs.

# %%
backbone = mmssl.load_backbone(BACKBONE)


def features(pictures: list[PIL.Image.Image]) -> torch.Tensor:
    """Frozen features, [pictures, width], each of length 1."""
    with torch.no_grad():
        parts = [backbone.encode_image(pictures[i : i + 100], pool="mean").pooled for i in range(0, len(pictures), 100)]
    return F.normalize(torch.cat(parts), dim=1)


train_features, test_features = features(train_pictures), features(test_pictures)
mean = train_features.mean(0)  # what all pictures have in common tells none from another
train_features, test_features = (F.normalize(x - mean, dim=1) for x in (train_features, test_features))
print("features", tuple(train_features.shape))

# %% [markdown]
# ## The nearest pictures
#
# Before any label is used: what does the backbone take for similar?

# %%
nearest = (test_features @ train_features.T).topk(2).indices
for query in range(3):
    print(f"{test_captions[query]}\n    is near  " + "\n        and  ".join(train_captions[i] for i in nearest[query]))

# %% [markdown]
# ## A few labels
#
# Five pictures of each colour; the mean of their features stands for it, and a picture gets the nearest one's.

# %%
few = [(train_labels == number).nonzero()[:5, 0] for number in range(len(classes))]
means = torch.stack([train_features[rows].mean(0) for rows in few])
few_shot = (test_features @ means.T).argmax(1).eq(test_labels).float().mean().item()
print(f"five labels a colour, frozen features: {few_shot:.1%} right (the commonest colour: {chance:.1%})")

# %% [markdown]
# ## Fine-tune
#
# The backbone is an `nn.Module`; a linear layer on it is the classifier.  The head learns faster than what is
# pretrained.  For better recipes (rates by layer, mixup, resuming, several GPUs) see docs/finetune.md.

# %%
backbone = mmssl.load_backbone(BACKBONE, drop_path_rate=0.05).train()
head = torch.nn.Linear(backbone.embed_dim, len(classes))
optimizer = torch.optim.AdamW(
    [{"params": backbone.parameters(), "lr": 1e-3}, {"params": head.parameters(), "lr": 5e-3}], weight_decay=0.05
)
STEPS, BATCH = 60, 32
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 5e-3], total_steps=STEPS)
for step in range(STEPS):
    rows = torch.randint(len(train_labels), (BATCH,))
    logits = head(backbone.encode_image([train_pictures[i] for i in rows], pool="mean").pooled)
    loss = F.cross_entropy(logits, train_labels[rows], label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 20 == 0 or step == STEPS - 1:
        print(f"step {step}: loss {loss.item():.3f}")

# %% [markdown]
# ## Evaluate

# %%
backbone.eval()
with torch.no_grad():
    logits = torch.cat(
        [
            head(backbone.encode_image(test_pictures[i : i + 100], pool="mean").pooled)
            for i in range(0, len(test_pictures), 100)
        ]
    )
fine_tuned = logits.argmax(1).eq(test_labels).float().mean().item()
print(f"fine-tuned on {len(train_labels)} labels: {fine_tuned:.1%} right; {time.monotonic() - began:.0f} s in all")

# %% [markdown]
# ## Keep it
#
# `torch.save({"backbone": backbone.state_dict(), "head": head.state_dict()}, "classifier.pt")`, and load both into
# modules made in the same way.  The image side alone, under timm's names, is `backbone.backbone.timm_state_dict()`.
