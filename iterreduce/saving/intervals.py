class Pacing:
    write_seconds = 0.0

    def __init__(s, every=None, mtbf=None, history=None, iterations=None):
        s.every, s.last = every, 0

    def restarted(s, i):
        s.last = i

    def iteration_done(s, seconds, beside):
        pass

    def due(s, i, now):
        s.i = i
        return bool(s.every) and i - s.last >= s.every

    def written(s, b, l, i):
        s.last = i

    def failed(s, now):
        s.last = s.i

    def plan(s):
        return {}
