"""Routes the turns of a conversation to one replica, as a request router of Ray Serve."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from selfdraft.integrations.ray.conversation import preferred


class ConversationRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are not typed here
    """The router. The first argument of a call is the name of its conversation (`conversation_of`), or empty."""

    def initialize_state(self, slots: int = 1) -> None:
        """`slots`: requests that one replica runs at once."""
        self.slots = slots

    async def choose_replicas(
        self, candidate_replicas: SequenceOf[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ray's question: which replicas to try, in which order."""
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            key = next((one for one in pending_request.args if isinstance(one, str)), "")
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {name: known.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        return [[by_name[name] for name in group] for group in preferred(key, loads, self.slots)]
