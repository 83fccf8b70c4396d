"""The peer of `obm bench serve`: the BM25 path of Search-R1's retrieval server.

    PYTHON launch/bench_serve_peer.py lucene INDEX PORT       # pyserini and Java, as theirs
    PYTHON launch/bench_serve_peer.py bm25s INDEX PORT        # bm25s for the scorer, without Java

Written after search_r1/search/retrieval_server.py (Apache-2.0): FastAPI, a blocking endpoint in the
framework's thread pool, the queries of a request one after another, each hit's stored document
parsed for its contents. With bm25s only the searcher differs. Run by the environment that
`bench_serve` makes; nothing of this project is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class QueryRequest(BaseModel):
    """Search-R1's request."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class LuceneRetriever:
    """pyserini's searcher over an index that stores its documents."""

    def __init__(self, index: str):
        from pyserini.search.lucene import LuceneSearcher

        self.searcher = LuceneSearcher(index)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """Contents and score of each hit."""
        hits = self.searcher.search(query, k)
        return [
            (json.loads(self.searcher.doc(hit.docid).raw())["contents"], hit.score) for hit in hits
        ]


class BM25sRetriever:
    """bm25s in its own way of use: dense scores of all passages, then the best."""

    def __init__(self, index: str):
        import bm25s

        self.bm25 = bm25s.BM25.load(index, mmap=True, load_corpus=True)
        self.tokenize = bm25s.tokenize

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """Contents and score of each hit."""
        tokens = self.tokenize(query, show_progress=False)
        rows, scores = self.bm25.retrieve(tokens, k=k, show_progress=False)
        return [
            (row["contents"], float(score))
            for row, score in zip(rows[0], scores[0], strict=True)
            if score > 0
        ]


def make_app(retriever: Any) -> FastAPI:
    """The server."""
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict[str, Any]:
        result = []
        for query in request.queries:
            found = retriever.search(query, request.topk or 3)
            documents = [_document(contents) for contents, _ in found]
            if request.return_scores:
                scored = zip(documents, (score for _, score in found), strict=True)
                result.append([{"document": d, "score": s} for d, s in scored])
            else:
                result.append(documents)
        return {"result": result}

    return app


def _document(contents: str) -> dict[str, str]:
    title, _, text = contents.partition("\n")
    return {"title": title.strip('"'), "text": text, "contents": contents}


def index_with_bm25s(corpus: str, output: str) -> None:
    """Builds the index of the second peer, as bm25s is used."""
    import bm25s

    lines = Path(corpus).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokens = bm25s.tokenize([row["contents"] for row in rows], show_progress=False)
    bm25 = bm25s.BM25(corpus=rows)
    bm25.index(tokens, show_progress=False)
    bm25.save(output, corpus=rows)


if __name__ == "__main__":
    kind, index, last = sys.argv[1:]
    if kind == "index":
        index_with_bm25s(index, last)
    else:
        made = LuceneRetriever(index) if kind == "lucene" else BM25sRetriever(index)
        uvicorn.run(make_app(made), host="127.0.0.1", port=int(last), log_level="warning")
