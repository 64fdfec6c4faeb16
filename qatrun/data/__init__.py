"""Tokenised, packed, seeded batches whose position can be saved and taken up again.

    rows of files or of the hub  ->  documents  ->  tokens  ->  packed sequences of seq_len  ->  batches

Documents follow each other with an EOS between them; attention runs across documents, as in pretraining. What opens
documents is loaded when first used: to check the demo's takes no `datasets`.
"""

from typing import TYPE_CHECKING

from qatrun.data.check import check_data, count_tokens
from qatrun.lazy import lazy_names

if TYPE_CHECKING:
    from qatrun.data.dataset import open_dataset
    from qatrun.data.packing import IGNORE_INDEX, Batch, Data, PackedStream, open_data, open_probe
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "qatrun.data.dataset": ("open_dataset",),
            "qatrun.data.packing": ("IGNORE_INDEX", "Batch", "Data", "PackedStream", "open_data", "open_probe"),
        },
    )

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Data",
    "PackedStream",
    "check_data",
    "count_tokens",
    "open_data",
    "open_dataset",
    "open_probe",
]
