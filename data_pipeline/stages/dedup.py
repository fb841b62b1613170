"""Which documents go: the stages from `signatures` to `clusters`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.code_fingerprint import code_fingerprint
from data_pipeline.dedup import clusters, grouping, minhash, published, signatures, verify
from data_pipeline.intake import DOCUMENTS_FILE
from data_pipeline.stages.context import (
    JobContext,
    detail_sum,
    file_hashes,
    folder_of,
    hashes_of,
    shard_path,
    text_bytes,
)
from data_pipeline.tasks import Task, TaskRecord, total

_PACKAGES = ("duckdb", "numba", "numpy", "pyarrow", "xxhash")
_FILES = {"exact": signatures.SIGNATURES_FILE, "near": signatures.BANDS_FILE}


def signature_tasks(context: JobContext) -> list[Task]:
    """Documents -> content hashes and band keys, one task a shard."""
    hasher = _hasher(context)
    return [
        Task(
            stage="signatures",
            partition=record.partition,
            subject=shard_path(record),
            work=signatures.write_signatures,
            arguments=(record.path(context.job.out, DOCUMENTS_FILE), hasher),
            config={"dedup": minhash.parameters_of(hasher)},
            code=code_fingerprint(signatures.write_signatures),
            inputs=hashes_of([record], DOCUMENTS_FILE),
            target=folder_of("signatures", record.partition),
            size_bytes=text_bytes([record]),
        )
        for record in context.records["filter"]
    ]


def published_tasks(context: JobContext) -> list[Task]:
    """Signatures of what other jobs kept -> the same under ids of this job, one task a shard of theirs."""
    return [
        Task(
            stage="published",
            partition=shard.partition,
            subject=str(shard.signatures),
            work=published.write_published,
            arguments=(shard,),
            config={},
            code=code_fingerprint(published.write_published),
            inputs=shard.hashes,
            target=folder_of("published", shard.partition),
        )
        for shard in _published_shards(context)
    ]


def edge_tasks(context: JobContext) -> list[Task]:
    """Equal hashes and band keys -> pairs, one task a range of keys."""
    dedup = context.job.dedup
    signed = [*context.records["published"], *context.records["signatures"]]
    n_documents = total(signed).documents_in + detail_sum(context.records["published"], "published")
    n_rows = {"exact": n_documents * dedup.exact, "near": n_documents * dedup.bands * dedup.minhash}
    return [
        _edge_task(context, kind, signed, (number, grouping.partitions_of(n_rows[kind])))
        for kind, wanted in (("exact", dedup.exact), ("near", dedup.minhash))
        if wanted
        for number in range(grouping.partitions_of(n_rows[kind]))
    ]


def _edge_task(context: JobContext, kind: str, signed: Sequence[TaskRecord], partition: tuple[int, int]) -> Task:
    number, n_partitions = partition
    with_candidates = kind == "near" and context.job.dedup.verify_jaccard is not None
    return Task(
        stage="edges",
        partition=f"{kind}-{number:04d}",
        subject=f"{kind} duplicates, part {number + 1} of {n_partitions}",
        work=grouping.write_edges,
        # Published documents come first: the smallest id of a group is its root.
        arguments=(kind, tuple(context.job.out / record.target for record in signed), partition, with_candidates),
        config={"kind": kind, "partition": [number, n_partitions], "with_candidates": with_candidates},
        code=code_fingerprint(grouping.write_edges),
        inputs=hashes_of(signed, _FILES[kind]),
        target=folder_of("edges", f"{kind}-{number:04d}"),
        size_bytes=sum(record.outputs[_FILES[kind]]["bytes"] for record in signed) // n_partitions,
    )


def shingle_tasks(context: JobContext) -> list[Task]:
    """Candidates for near duplicates -> their shingle sets, one task a shard; only for verification."""
    if context.job.dedup.verify_jaccard is None:
        return []
    ngram = context.job.dedup.ngram
    near = _edge_records(context, "near")
    folders = tuple(context.job.out / record.target for record in near)
    candidates = hashes_of(near, grouping.CANDIDATES_FILE)

    def task(partition: str, documents: Path, ordinal: int | None, inputs: dict[str, str], size_bytes: int) -> Task:
        return Task(
            stage="shingles",
            partition=partition,
            subject=str(documents),
            work=verify.write_shingles,
            arguments=(documents, folders, ngram, ordinal),
            config={"dedup": {"ngram": ngram}},
            code=code_fingerprint(verify.write_shingles),
            inputs={**candidates, **inputs},
            target=folder_of("shingles", partition),
            size_bytes=size_bytes,
        )

    own = [
        task(
            record.partition,
            record.path(context.job.out, DOCUMENTS_FILE),
            None,
            hashes_of([record], DOCUMENTS_FILE),
            text_bytes([record]),
        )
        for record in context.records["filter"]
    ]
    others = [
        task(shard.partition, shard.documents, shard.ordinal, file_hashes([shard.documents]), 0)
        for shard in _published_shards(context)
    ]
    return [*own, *others]


def verify_tasks(context: JobContext) -> list[Task]:
    """Pairs of near duplicates -> those whose shingle sets are similar, one task a range of keys."""
    threshold = context.job.dedup.verify_jaccard
    if threshold is None:
        return []
    return [
        Task(
            stage="verify",
            partition=record.partition,
            subject=f"pairs of {record.partition}",
            work=verify.write_verified,
            arguments=(context.job.out / record.target, context.folders("shingles"), threshold),
            config={"dedup": {"verify_jaccard": threshold}},
            code=code_fingerprint(verify.write_verified),
            inputs={**hashes_of([record], grouping.EDGES_FILE), **context.hashes("shingles")},
            target=folder_of("verify", record.partition),
            size_bytes=record.outputs[grouping.EDGES_FILE]["bytes"],
        )
        for record in _edge_records(context, "near")
    ]


def cluster_tasks(context: JobContext) -> list[Task]:
    """Pairs -> clusters, and which of their members stay."""
    job = context.job
    exact = _edge_records(context, "exact")
    near = context.records["verify"] or _edge_records(context, "near")
    priorities = [planned.source.priority for planned in context.shards]
    return [
        Task(
            stage="clusters",
            partition="all",
            subject="all documents",
            work=clusters.write_clusters,
            arguments=(
                tuple(job.out / record.target for record in exact),
                tuple(job.out / record.target for record in near),
                context.folders("signatures"),
                priorities,
                job.dedup.keep,
                context.folders("published"),
            ),
            config={"priorities": priorities, "dedup": {"keep": job.dedup.keep}},
            code=code_fingerprint(clusters.write_clusters),
            inputs={
                **hashes_of([*exact, *near], grouping.EDGES_FILE),
                **context.hashes("signatures", signatures.SIGNATURES_FILE),
                **context.hashes("published", signatures.SIGNATURES_FILE),
            },
            target=folder_of("clusters", "all"),
            size_bytes=sum(record.outputs[grouping.EDGES_FILE]["bytes"] for record in (*exact, *near)),
        )
    ]


def _edge_records(context: JobContext, kind: str) -> list[TaskRecord]:
    return [record for record in context.records["edges"] if record.config["kind"] == kind]


def _published_shards(context: JobContext) -> list[published.PublishedShard]:
    return published.published_shards(context.job.dedup.against, _hasher(context))


def _hasher(context: JobContext) -> minhash.MinHasher | None:
    dedup = context.job.dedup
    return minhash.MinHasher(dedup.ngram, dedup.bands, dedup.rows) if dedup.minhash else None
