"""The stages of deduplication run by hand, in folders as a job lays them out."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.dedup.clusters import CLUSTERS_FILE, write_clusters
from data_pipeline.dedup.grouping import write_edges
from data_pipeline.dedup.minhash import MinHasher, parameters_of
from data_pipeline.dedup.published import published_shards, write_published
from data_pipeline.dedup.signatures import write_signatures
from data_pipeline.dedup.verify import write_shingles, write_verified
from data_pipeline.tasks import Counts, Task, commit, execute
from tests.data_pipeline.dedup_oracle import write_documents

HASHER = MinHasher(5, 14, 8)


@dataclass
class DedupJob:
    """Shards of documents (ids as they are in the job), and how they are deduplicated."""

    out: Path
    shards: Sequence[dict[int, str]]
    hasher: MinHasher = HASHER
    n_partitions: int = 1
    priorities: Sequence[int] | None = None
    keep: str = "first"
    verify: float | None = None
    against: Sequence[Path] = ()
    counts: Counts = field(init=False)

    def run(self) -> list[dict]:
        """Rows of clusters.parquet."""
        own = [self._sign(i) for i in range(len(self.shards))]
        published = published_shards(self.against, self.hasher)
        copies = [self._do("published", shard.partition, write_published, (shard,)) for shard in published]
        edges = {kind: self._edges(kind, [*own, *copies]) for kind in ("exact", "near")}
        if self.verify is not None:
            edges["near"] = self._verified(edges["near"], published)
        arguments = (edges["exact"], edges["near"], own, self.priorities or [0] * len(own), self.keep, copies)
        folder = self._do("clusters", "all", write_clusters, arguments)
        (self.out / "manifest.json").write_text("{}")
        record = json.loads((self.out / "stages/clusters/all.json").read_text())
        self.counts = Counts(**record["counts"])
        return pq.read_table(folder / CLUSTERS_FILE).to_pylist()

    def removed(self) -> dict[int, dict]:
        """Rows of the documents that go, by id."""
        return {row["doc_id"]: row for row in self.run() if not row["kept"]}

    def documents(self, i: int) -> Path:
        return self.out / f"stages/filter/{i:06d}/docs.parquet"

    def _sign(self, i: int) -> Path:
        path = write_documents(self.documents(i), self.shards[i])
        name = f"{i:06d}"
        return self._do("signatures", name, write_signatures, (path, self.hasher), {f"filter/{name}/docs.parquet": "x"})

    def _edges(self, kind: str, signed: list[Path]) -> list[Path]:
        n, with_candidates = self.n_partitions, kind == "near" and self.verify is not None
        return [
            self._do("edges", f"{kind}-{p}", write_edges, (kind, signed, (p, n), with_candidates)) for p in range(n)
        ]

    def _verified(self, near: list[Path], published: list) -> list[Path]:
        sources = [(f"{i:06d}", (self.documents(i), near, self.hasher.ngram)) for i in range(len(self.shards))]
        sources += [(s.partition, (s.documents, near, self.hasher.ngram, s.ordinal)) for s in published]
        sets = [self._do("shingles", name, write_shingles, arguments) for name, arguments in sources]
        arguments = [(folder, sets, self.verify) for folder in near]
        return [self._do("verify", str(p), write_verified, values) for p, values in enumerate(arguments)]

    def _do(self, stage: str, partition: str, work, arguments: tuple, inputs: dict[str, str] | None = None) -> Path:
        target = Path("stages") / stage / partition
        config = {"dedup": parameters_of(self.hasher)}
        task = Task(stage, partition, "", work, arguments, config, "code", inputs or {}, target)
        commit(task, execute(task, self.out), self.out)
        return self.out / target


def again(job: DedupJob, **changes) -> DedupJob:
    """The same job with other settings."""
    values = {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.init}
    return DedupJob(**(values | changes))
