"""What all tests share."""

import gc
import os

import pytest
import torch

gc.disable()  # while modules are imported: a quarter of that time, in which it would find nothing
if not torch.cuda.is_available():  # as Lightning sets torch, it would be looked for at every question
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _imported_libraries_are_no_garbage():
    # A million objects, through which each `gc.collect` of a search's trial would go.
    gc.freeze()
    gc.enable()
