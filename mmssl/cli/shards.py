"""``mmssl shards index`` and ``mmssl shards check``."""

import os
import sys

from mmssl.cli.keys import UsageError
from mmssl.data.index import ShardIndex, index_shard
from mmssl.data.shards import ShardSet, expand
from mmssl.data.tar import ShardError, open_shard, scan


def index(shards: list[str]) -> None:
    """Write the index of every shard, so that training starts at once.

    Args:
        shards: Paths, globs or brace patterns of tar shards.
    """

    def tell(shard: ShardIndex) -> None:
        print(f"{shard.path}: {shard.samples} samples", flush=True)

    total = ShardSet(shards, progress=tell)
    print(f"{len(total.shards)} shards, {len(total)} samples, fingerprint {total.fingerprint}")


def check(shards: list[str]) -> None:
    """Read every shard's headers and name the damaged and the incomplete ones.

    Args:
        shards: Paths, globs or brace patterns of tar shards.
    """
    bad = 0
    paths = expand(shards)
    for path in paths:
        try:
            descriptor = open_shard(path)
            try:
                scan(descriptor, path)
            finally:
                os.close(descriptor)
            found = index_shard(path)
            print(f"{path}: {found.samples} samples, whole", flush=True)
        except (ShardError, OSError) as error:
            bad += 1
            print(f"{error}", file=sys.stderr, flush=True)
    if bad:
        raise UsageError(f"{bad} of {len(paths)} shards cannot be used; they are named above")
