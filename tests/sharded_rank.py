"""One of two ranks that save a checkpoint with sharded tensors, as FSDP2 does: sharded_rank.py RANK CKPT OUT."""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(rank: str, checkpoint: str, out: str) -> None:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    content = torch.load(checkpoint, weights_only=True)
    state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in content.pop("state_dict").items()}
    dcp.save({"state_dict": state}, checkpoint_id=out)
    if rank == "0":
        content.pop("optimizer_states")
        torch.save(content, os.path.join(out, "meta.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
