"""Sources of preferences: each reads files of one layout and yields records, best candidate first.

A new layout is one function that makes records, and one entry in `SOURCES`.
"""

from dpo_jax.data.sources import csv_tables, folders, listings, tables, tar
from dpo_jax.data.sources.record import Chunk, Damaged, Dropped, Outcome, Record, Source, Unusable, missing

__all__ = ["SOURCES", "Chunk", "Damaged", "Dropped", "Outcome", "Record", "Source", "Unusable", "missing"]

SOURCES = {
    "pickapic": tables.table_source(
        tables.PICKAPIC, "Pick-a-Pic v1 and v2: parquet with jpg_0, jpg_1, caption, label_0 ..."
    ),
    "open_image_preferences": tables.table_source(
        tables.OPEN_IMAGE_PREFERENCES,
        "open-image-preferences-v1: parquet with chosen, rejected, prompt ...",
    ),
    "hpdv3": Source(
        listings.hpdv3_chunks, listings.read_hpdv3, "HPDv3 and HPDv2: JSON files, with their images beside them."
    ),
    "imagerewarddb": Source(
        listings.imagerewarddb_chunks,
        listings.read_imagerewarddb,
        "ImageRewardDB: metadata-*.parquet, with its images beside them in folders or zips.",
    ),
    "jsonl": Source(
        listings.jsonl_chunks,
        listings.read_jsonl,
        "JSON lines of prompt, chosen, rejected (paths); or prompt, images (paths) and one of preferred (index), "
        "ranks, votes, scores.",
    ),
    "csv": Source(
        csv_tables.csv_chunks,
        csv_tables.read_csv,
        "CSV or TSV tables with the columns prompt, chosen, rejected (paths); or prompt, image_0, image_1, preferred.",
    ),
    "pairs_folder": Source(
        folders.pairs_folder_chunks,
        folders.read_pairs_folder,
        "Folders with preferred images in w/, the other image of the same name in l/, captions in .txt files.",
    ),
    "liked": Source(
        folders.liked_chunks,
        folders.read_liked,
        "Folders with images in liked/ and disliked/, captions in .txt files.",
    ),
    "captioned_folder": Source(
        folders.captioned_chunks,
        folders.read_captioned,
        'Folders of single images, captions in .txt files beside them: for loss.name="sft".',
    ),
    "pickapic_tar": Source(
        tar.pickapic_tar_chunks,
        tar.read_pickapic_tar,
        "WebDataset tars of Pick-a-Pic: KEY.jpg_0.jpg, KEY.jpg_1.jpg, KEY.label_0.txt, KEY.original_prompt.txt ...",
    ),
}
