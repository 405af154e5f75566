"""The served models' tensors, as ``hiertcn.export.tensors`` defines them."""

from hiertcn.export.tensors import *  # noqa: F403
