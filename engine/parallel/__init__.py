"""One run on many processes, to the same bits: who computes what, and what travels.

    ranks.py      the processes of a run (torch calls the number of one its rank), and what they tell each other
    tree.py       the sum of a step's gradients, added in one fixed order whoever computed them
    statistics.py buffers that a forward pass changes, as batch norms have
    sharding.py   a model of which each process has a part (FSDP2), and what keeps its processes in step
    config.py     the table `[parallel]` of a run

Floating-point addition is not associative, so that a sum depends on the order of its terms, and random numbers that
come one after the other depend on who drew before. Both are made independent of the number of processes here. A step is
cut into the same micro-batches however many processes there are; each computes a contiguous block of them, draws its
random numbers from (seed, step, micro-batch), and adds gradients in the order of one binary tree over all of them. Then
weights, metrics and checkpoints are bitwise those of one process, which adds in the same tree.

A single process needs no process group: every function here gives what it would give among one.
"""
