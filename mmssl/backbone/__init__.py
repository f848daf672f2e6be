"""The shared transformer and the decoder of masked autoencoding."""

from mmssl.backbone.decoder import Decoder
from mmssl.backbone.make import make_backbone
from mmssl.backbone.pixels import Normalizes
from mmssl.backbone.vit import Backbone, Encoded

__all__ = ["Backbone", "Decoder", "Encoded", "Normalizes", "make_backbone"]
