# For the type checker only. Every indexing of a real h5py object gives a union of group, dataset
# and named type, so the published stubs report correct code; here h5py is simply untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
