"""Dimensions of models small enough to try many things on: a ResNet, and a vision transformer."""
from clip_ttrt.models import Dimensions

RESNET = Dimensions(64, 64, 32, 16, (2, 1, 1, 1), 8, 100, 64, 2)
VIT = Dimensions(64, 64, 16, 64, 2, 8, 100, 64, 2)
