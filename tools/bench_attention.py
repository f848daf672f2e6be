"""Packed attention on this machine: forward and backward of a small backbone on pairs, against other ways of doing it.

    python tools/bench_attention.py [--threads 1] [--pairs 64] [--steps 8]

Rows: mmssl's packed form; the same with torch's fused kernel for every group of segments; padding every segment to the
longest with a boolean mask.  All three have the same weights and inputs and run in turn, round by round; the figure
is the median process time of a step, which other processes disturb less than wall time.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbone import Backbone
from mmssl.backbone import attention as packed
from mmssl.types import Text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--patches", type=int, default=18, help="visible patches of each picture")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 21, (args.pairs,), generator=generator)
    ids = torch.randint(5, 4000, (int(lengths.sum()),), generator=generator)
    empty = torch.empty(0, dtype=torch.int64)
    text = Text(ids, F.pad(lengths.cumsum(0), (1, 0)).int(), 32, empty, empty)
    backbone = Backbone(
        "vit_tiny_patch16_224",
        vocab_size=4000,
        max_text_tokens=32,
        img_size=48,
        patch_size=8,
        options={"embed_dim": 192, "depth": 6, "num_heads": 3},
    )
    pixels = torch.randn(args.pairs, 3, 48, 48, generator=generator)
    visible = torch.rand(args.pairs, 36, generator=generator).argsort(1)[:, : args.patches].sort(1).values
    print(f"{platform.processor() or platform.machine()}, {args.threads} thread(s), torch {torch.__version__}")
    print(
        f"{args.pairs} pairs, {1 + args.patches} image and {lengths.float().mean():.1f} text tokens, width 192, 6 deep"
    )
    for dtype in (torch.float32, torch.bfloat16):
        ways = {
            "packed (mmssl)": lambda: whole(backbone, pixels, visible, text),
            "packed, fused kernel": lambda: fused(backbone, pixels, visible, text),
            "padded, boolean mask": lambda: padded(backbone, pixels, visible, text, lengths),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.steps + 1):
            for name, way in ways.items():
                begin = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                    loss = way().float().square().mean()
                loss.backward()
                if turn:  # the first round warms up
                    times[name].append(time.process_time() - begin)
        first = statistics.median(times["packed (mmssl)"])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(f"{str(dtype).removeprefix('torch.'):>9}  {name:<22} {1e3 * median:7.1f} ms  x {median / first:.2f}")


def whole(backbone: Backbone, pixels: Tensor, visible: Tensor, text: Text) -> Tensor:
    encoded = backbone(pixels, visible, text)
    return torch.cat([x.flatten(0, -2) for x in encoded])


def fused(backbone: Backbone, pixels: Tensor, visible: Tensor, text: Text) -> Tensor:
    short, packed._SHORT = packed._SHORT, 0
    try:
        return whole(backbone, pixels, visible, text)
    finally:
        packed._SHORT = short


def padded(backbone: Backbone, pixels: Tensor, visible: Tensor, text: Text, lengths: Tensor) -> Tensor:
    """The same blocks on [pairs, longest, width] with the padding masked out of attention."""
    vit = backbone.vit
    image, _ = backbone._embed_image(pixels, visible)
    words = nn.utils.rnn.pad_sequence(list(backbone.text(text).split(lengths.tolist())), batch_first=True)
    x = torch.cat([image, words], 1)
    real = torch.arange(words.shape[1]) < lengths[:, None]
    real = torch.cat([real.new_ones(image.shape[:2]), real], 1)
    bias = real[:, None, None, :]
    for block in vit.blocks:
        x = block(x, None, bias)
    return vit.norm(x)[real]


if __name__ == "__main__":
    main()
