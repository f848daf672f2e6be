"""Pretrained backbones: find one, build it, encode with it.  Needs neither Lightning nor webdataset."""

from mmssl.pretrained.load import load_backbone
from mmssl.pretrained.model import Encoded, Pretrained

__all__ = ["Encoded", "Pretrained", "load_backbone"]
