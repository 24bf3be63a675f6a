"""The chain of a small fleet in plain Python, by its own rules of counting: what the compiled chain and simulator are
checked against."""

from collections import defaultdict
from itertools import product
from math import prod

import numpy as np
from scipy import sparse
from scipy.optimize import linprog


def then(law, step):
    """Law of the state after a random step from a random state."""
    result = defaultdict(float)
    for state, probability in law.items():
        for target, q in step(state).items():
            result[target] += probability * q
    return result


class BruteForceChain:
    """States: classes that wait for a prefill in order of arrival, GPUs as (role, prefill, decodes), a buffer per side.

    At most `prefill_cap` wait for a prefill and `decode_cap` for a decode, in all buffers together; who finds no place
    is turned away. Where the order of arrival does not matter, it is forgotten. Costs about 0.1 ms per state.
    """

    def __init__(self, system, prefill_cap, decode_cap):
        self.s, self.prefill_cap, self.decode_cap = system, prefill_cap, decode_cap
        self.sides = len(system.side_share)
        gpus = tuple((r, -1, (0,) * system.classes) for r in range(system.roles) for _ in range(system.role_gpus[r]))
        first = ((), gpus, ((),) * self.sides)
        self.index, self.reward, self.cut = {first: 0}, {}, {}
        self.turned_away = False
        rows, columns, rates, frontier = [], [], [], [first]
        while frontier:
            state = frontier.pop()
            for rate, law in self.transitions(state):
                for target, probability in then(law, self.forget).items():
                    if target not in self.index:
                        self.index[target] = len(self.index)
                        frontier.append(target)
                    rows.append(self.index[state])
                    columns.append(self.index[target])
                    rates.append(rate * probability)
        size = len(self.index)
        jumps = sparse.coo_matrix((rates, (columns, rows)), shape=(size, size)).tocsr()
        leaving = np.asarray(jumps.sum(axis=0)).ravel()
        clock = 1.02 * leaving.max()
        self.law, residual = np.full(size, 1.0 / size), np.inf
        while residual > 1e-14:  # power iteration of the uniformised chain
            drift = (jumps @ self.law - leaving * self.law) / clock
            self.law, residual = self.law + drift, np.abs(drift).sum()

    def forget(self, state):
        queue, gpus, buffers = state
        kept = []
        for side, buffer in enumerate(buffers):
            weighted = sorted(i for i in buffer if self.s.side_weight[side, i] > 0)
            kept.append((*weighted, *(i for i in buffer if self.s.side_weight[side, i] == 0)))
        return {(queue if self.s.gate_fcfs else tuple(sorted(queue)), tuple(sorted(gpus)), tuple(kept)): 1.0}

    def free(self, gpu):
        role, prefill, decodes = gpu
        return min(self.s.role_decode_slots[role], self.s.role_slots[role] - (prefill >= 0)) - sum(decodes)

    def transitions(self, state):
        queue, gpus, buffers = state
        s = self.s
        reward, moves = 0.0, []
        self.turned_away = False
        for i in range(s.classes):
            law = self.gate(((*queue, i), gpus, buffers))
            moves.append((s.arrival_rate[i], then(law, lambda after: self.within_cap(state, after))))
        for k, i in enumerate(queue):
            moves.append((s.abandonment_rate[i], self.gate((queue[:k] + queue[k + 1 :], gpus, buffers))))
        for side, buffer in enumerate(buffers):
            for k, i in enumerate(buffer):
                left = (*buffers[:side], buffer[:k] + buffer[k + 1 :], *buffers[side + 1 :])
                moves.append((s.abandonment_rate[i], self.gate((queue, gpus, left))))
        for k, (role, prefill, decodes) in enumerate(gpus):
            mode = s.role_prefill_mode[role]
            now = mode if prefill >= 0 else s.role_rest_mode[role]
            if prefill >= 0:
                rate = s.mode_chunk[mode] / s.mode_time[mode] / s.prompt_tokens[prefill]
                reward += rate * s.prefill_reward[prefill]
                law = {(queue, (*gpus[:k], (role, -1, decodes), *gpus[k + 1 :]), buffers): 1.0}
                law = then(law, lambda state: self.gate(state, between=1)) if s.gate_first else law
                law = then(law, lambda state, k=k, i=prefill: self.place(state, k, i))
                moves.append((rate, self.settle(law, k)))
            for i, count in enumerate(decodes):
                if count:
                    rate = count / (s.mode_time[now] * s.output_tokens[i])
                    reward += rate * s.decode_reward[i]
                    law = {(queue, self.seat(gpus, k, i, -1), buffers): 1.0}
                    moves.append((rate, self.settle(then(law, self.gate) if s.gate_first else law, k)))
        self.reward[state] = reward
        self.cut[state] = self.turned_away
        return moves

    def within_cap(self, before, after):
        if len(after[0]) <= self.prefill_cap:
            return {after: 1.0}
        self.turned_away = True
        return {before: 1.0}

    @staticmethod
    def seat(gpus, k, i, change=1):
        role, prefill, decodes = gpus[k]
        decodes = tuple(d + change * (j == i) for j, d in enumerate(decodes))
        return (*gpus[:k], (role, prefill, decodes), *gpus[k + 1 :])

    def place(self, state, k, i):
        """Where a class-i request goes whose prefill ended on GPU k."""
        queue, gpus, buffers = state
        if self.s.role_stays[gpus[k][0]]:
            return {(queue, self.seat(gpus, k, i), buffers): 1.0}
        law = defaultdict(float)
        for side in range(self.sides):
            share = self.s.side_share[side, i]
            if share == 0:
                continue
            for role in self.s.router_order:
                able = [j for j, gpu in enumerate(gpus) if gpu[0] == role and self.free(gpu) > 0]
                if self.s.role_side[role] == side and able:
                    for j in able:
                        law[queue, self.seat(gpus, j, i), buffers] += share / len(able)
                    break
            else:
                full = sum(map(len, buffers)) == self.decode_cap
                self.turned_away |= full
                longer = buffers[side] if full else (*buffers[side], i)
                law[queue, gpus, (*buffers[:side], longer, *buffers[side + 1 :])] += share
        return law

    def settle(self, law, k):
        return then(then(law, lambda state: self.fill(state, k)), self.gate)

    def fill(self, state, k):
        """GPU k takes from the buffer of its side."""
        queue, gpus, buffers = state
        side = self.s.role_side[gpus[k][0]]
        buffer = buffers[side]
        if not buffer or self.free(gpus[k]) <= 0:
            return {state: 1.0}
        weight = {i: self.s.side_weight[side, i] for i in set(buffer)}
        total = sum(weight.values())
        law = defaultdict(float)
        for i in weight if total else buffer[:1]:
            if total and not weight[i]:
                continue
            at = buffer.index(i)
            left = (*buffers[:side], buffer[:at] + buffer[at + 1 :], *buffers[side + 1 :])
            law[queue, self.seat(gpus, k, i), left] = weight[i] / total if total else 1.0
        return then(law, lambda state: self.fill(state, k))

    def gate(self, state, between=0):
        """Admissions; `between` decodes have just been prefilled and wait, in no buffer yet."""
        queue, gpus, buffers = state
        s = self.s
        idle = [
            k
            for k, (role, prefill, decodes) in enumerate(gpus)
            if s.role_prefill_mode[role] >= 0 and prefill < 0 and sum(decodes) < s.role_slots[role]
        ]
        backlog = between + sum(map(len, buffers)) - sum(map(self.free, gpus))
        waiting = [i for i in queue if backlog < -s.gate_hold[i]]
        if not idle or not waiting:
            return {state: 1.0}
        running = [sum(gpu[1] == i for gpu in gpus) for i in range(s.classes)]
        i = waiting[0]
        if not s.gate_fcfs:
            excess = [queue.count(j) - s.gate_queue_target[j] for j in range(s.classes)]
            i = min(waiting, key=lambda j: (s.gate_base[j] + s.gate_slope[j] * running[j], -excess[j], j))
        if s.placement == 1:
            fewest = min(sum(gpus[k][2]) for k in idle)
            idle = [k for k in idle if sum(gpus[k][2]) == fewest]
        at = queue.index(i)
        shorter = queue[:at] + queue[at + 1 :]
        law = {
            (shorter, (*gpus[:k], (gpus[k][0], i, gpus[k][2]), *gpus[k + 1 :]), buffers): 1 / len(idle) for k in idle
        }
        return then(law, lambda state: self.gate(state, between))

    def means(self):
        """Means of queue, buffers, prefills and decodes by role and class; reward rate; mass at the cut-off."""
        s = self.s
        queue, buffered = np.zeros(s.classes), np.zeros(s.classes)
        prefill, decode = np.zeros((s.roles, s.classes)), np.zeros((s.roles, s.classes))
        reward = cut = 0.0
        for (waiting, gpus, buffers), k in self.index.items():
            mass = self.law[k]
            for i in waiting:
                queue[i] += mass
            for buffer in buffers:
                for i in buffer:
                    buffered[i] += mass
            for role, running, decodes in gpus:
                decode[role] += mass * np.array(decodes)
                if running >= 0:
                    prefill[role, running] += mass
            reward += mass * self.reward[waiting, gpus, buffers]
            cut += mass * self.cut[waiting, gpus, buffers]
        return queue, buffered, prefill, decode, reward, cut


class BruteForceControl:
    """All that a controller can do: from every state after an event, the states in which it may act no more.

    A state is the GPUs as (role, prefill, decodes), the prefill queue and the decode queue as counts by class. A queue
    above its cap cannot stay so: somebody starts, or is turned away.
    """

    def __init__(self, system, prefill_cap, decode_cap):
        self.s, self.caps = system, (prefill_cap, decode_cap)
        none = (0,) * system.classes
        gpus = tuple((r, -1, none) for r in range(system.roles) for _ in range(system.role_gpus[r]))
        self.first = (gpus, none, none)
        self.options, self.moves, self.reward = {}, {}, {}
        frontier = {self.first}
        while frontier:
            state = frontier.pop()
            self.options[state] = self.reachable(state)
            for rest in self.options[state]:
                if rest not in self.moves:
                    self.moves[rest], self.reward[rest] = self.events(rest)
                    frontier |= {target for _, target in self.moves[rest] if target not in self.options}

    def reachable(self, state):
        seen, frontier = {state}, [state]
        while frontier:
            fresh = [after for after in self.actions(frontier.pop()) if after not in seen]
            seen |= set(fresh)
            frontier += fresh
        return sorted(each for each in seen if sum(each[1]) <= self.caps[0] and sum(each[2]) <= self.caps[1])

    def actions(self, state):
        gpus, queue, buffer = state
        s = self.s
        for i in range(s.classes):
            for k, (role, prefill, decodes) in enumerate(gpus):
                others, held = gpus[:k] + gpus[k + 1 :], sum(decodes) + (prefill >= 0)
                if queue[i] and prefill < 0 and s.role_prefill_mode[role] >= 0 and held < s.role_slots[role]:
                    yield tuple(sorted((*others, (role, i, decodes)))), changed(queue, i, -1), buffer
                if buffer[i] and sum(decodes) < s.role_decode_slots[role] and held < s.role_slots[role]:
                    seated = (role, prefill, changed(decodes, i, 1))
                    yield tuple(sorted((*others, seated))), queue, changed(buffer, i, -1)
            if queue[i] and sum(queue) > self.caps[0]:
                yield gpus, changed(queue, i, -1), buffer
            if buffer[i] and sum(buffer) > self.caps[1]:
                yield gpus, queue, changed(buffer, i, -1)

    def events(self, state):
        gpus, queue, buffer = state
        s = self.s
        moves, reward = [], 0.0
        for i in range(s.classes):
            moves.append((s.arrival_rate[i], (gpus, changed(queue, i, 1), buffer)))
            if queue[i]:
                moves.append((queue[i] * s.abandonment_rate[i], (gpus, changed(queue, i, -1), buffer)))
            if buffer[i]:
                moves.append((buffer[i] * s.abandonment_rate[i], (gpus, queue, changed(buffer, i, -1))))
        for k, (role, prefill, decodes) in enumerate(gpus):
            others = gpus[:k] + gpus[k + 1 :]
            mode = s.role_prefill_mode[role]
            if prefill >= 0:
                rate = s.mode_chunk[mode] / s.mode_time[mode] / s.prompt_tokens[prefill]
                ended = tuple(sorted((*others, (role, -1, decodes))))
                moves.append((rate, (ended, queue, changed(buffer, prefill, 1))))
                reward += rate * s.prefill_reward[prefill]
            for i, count in enumerate(decodes):
                if count:
                    rate = count / (s.mode_time[mode if prefill >= 0 else s.role_rest_mode[role]] * s.output_tokens[i])
                    moves.append(
                        (rate, (tuple(sorted((*others, (role, prefill, changed(decodes, i, -1))))), queue, buffer))
                    )
                    reward += rate * s.decode_reward[i]
        return [move for move in moves if move[0] > 0], reward

    def linear_program(self):
        """The greatest gain of the fleet: the least g that has values v after events and w at rest such that v >= w
        wherever an option leads, and g >= reward + the drift of the values."""
        at_rest = {state: k for k, state in enumerate(self.moves)}
        after = {state: len(at_rest) + k for k, state in enumerate(self.options)}
        gain = len(at_rest) + len(after)
        entries, bounds = [], []
        for state, options in self.options.items():
            for rest in options:
                entries += [(len(bounds), at_rest[rest], 1.0), (len(bounds), after[state], -1.0)]
                bounds.append(0.0)
        for rest, moves in self.moves.items():
            for rate, target in moves:
                entries += [(len(bounds), after[target], rate), (len(bounds), at_rest[rest], -rate)]
            entries.append((len(bounds), gain, -1.0))
            bounds.append(-self.reward[rest])
        row, column, value = zip(*entries, strict=True)
        matrix = sparse.coo_matrix((value, (row, column)), shape=(len(bounds), gain + 1)).tocsr()
        cost = np.zeros(gain + 1)
        cost[gain] = 1.0
        found = linprog(cost, A_ub=matrix, b_ub=bounds, bounds=(None, None), method="highs")
        assert found.status == 0, found.message
        return found.fun

    def policies(self):
        """Number of deterministic policies."""
        return prod(len(options) for options in self.options.values())

    def enumerate(self):
        """The greatest gain of the fleet over every deterministic policy, from the empty fleet."""
        rests = {state: k for k, state in enumerate(self.moves)}
        clock = 1.1 * max(sum(rate for rate, _ in moves) for moves in self.moves.values())
        reward = np.array(list(self.reward.values()))
        best = -np.inf
        for chosen in product(*self.options.values()):
            decides = dict(zip(self.options, chosen, strict=True))
            step = np.eye(len(rests))
            for rest, moves in self.moves.items():
                for rate, target in moves:
                    step[rests[rest], rests[decides[target]]] += rate / clock
                    step[rests[rest], rests[rest]] -= rate / clock
            for _ in range(30):  # 2^30 steps
                step = step @ step
                step /= step.sum(axis=1, keepdims=True)
            best = max(best, step[rests[decides[self.first]]] @ reward)
        return best


def changed(counts, i, change):
    return (*counts[:i], counts[i] + change, *counts[i + 1 :])
