"""Dimensions of models small enough to try many things on: a ResNet, and vision transformers."""
from clip_ttrt.models import Dimensions

RESNET = Dimensions(64, 64, 32, 16, (2, 1, 1, 1), 8, 100, 64, 2)
VIT = Dimensions(64, 64, 16, 64, 2, 8, 100, 64, 2)
# OpenCLIP's: heads, inner widths and GELU as of H/14, g/14 and bigG/14, and other poolings.
OF_80 = Dimensions(64, 64, 16, 160, 3, 8, 100, 128, 2, 80, gelu="none", family="open_clip")
OF_88 = Dimensions(64, 64, 16, 176, 2, 8, 100, 128, 2, 88, image_mlp=768, text_mlp=558,
                   gelu="none", image_pooling="mean", family="open_clip")
OF_104 = Dimensions(64, 64, 16, 208, 2, 8, 100, 160, 2, 104, 80, image_mlp=1024, text_mlp=640,
                    gelu="tanh", image_pooling="mean", logit_bias=True, family="open_clip")
