/* The protocol of a replicated log, for spin: what `_appender` and `_replicated` do, and nothing
 * else.  Two writers take a log over from each other and append batches to it by compare-and-set.
 *
 * The network: what was sent may be delivered at any time from then on, any number of times, or
 * never; each answer may be lost; a server that is behind may refuse what another would take.  The
 * stream itself is one, as a majority of servers keeps it.
 *
 * What must hold:
 *   an acknowledged batch stands at its place, with the LSN that its writer believes;
 *   no batch stands in the log twice;
 *   what was called "not written" is not there when everything has been delivered;
 *   once a log is open, nothing of its former owner is appended;
 *   whoever opens it finds where it ends, though it was purged, and nothing is purged that no
 *   snapshot has.
 *
 * Seeded bugs, each of which must be found: -DNO_EPOCH -DNO_IDENT -DALL_OTHERS -DTAIL_FIRST
 * -DCALL_ABSENT -DNEW_PLACE -DPURGE_ALL -DPURGE_AHEAD.
 */

#ifndef BATCHES
#define BATCHES 2       /* of each writer */
#endif
#ifndef TRIES
#define TRIES 2         /* of each append, then its outcome is not known */
#endif
#define ITEMS (BATCHES + 2)             /* of a writer: its epoch record, its mark, its batches */
#define EPOCH 0
#define MARK 1
#define PLACES (2 * ITEMS + 1)
#define NOBODY 2
#define NONE 0
#define OK 1
#define CONFLICT 2

#define ABSENT 1        /* outcomes that a user was told */
#define DURABLE 2
#define UNKNOWN 3

typedef Entry {
    byte writer;
    byte item;
    byte lsn;           /* the newest one, with this entry, as its writer believes */
    byte truth;         /* how many batches there really are, with it */
}
Entry stream[PLACES];
byte last = 0;          /* position of the newest entry; the first one is 1 */
byte first = 1;         /* what is below was purged */
byte snapshot = 0;      /* up to this LSN a snapshot is there */

typedef Writer {
    byte sent[ITEMS];   /* 1 + the position after which an item was asked to stand; 0: not sent */
    byte lsns[ITEMS];   /* what each would be */
    bool epochs[PLACES];/* the same for the epoch record, which tries several places */
    byte purge;         /* below this position, if it was sent */
    byte told[ITEMS];
    byte waits;         /* 1 + the item whose answer is waited for */
    byte answer;
    bool open;
    bool done;
}
Writer writers[2];

/* A server receives an item, compares, and appends it; if it is the one that its writer waits for,
 * the answer may arrive, or be lost.  A refusal is not modelled here: see `Network`. */
inline deliver(w, i) {
    assert(i == EPOCH || !writers[1 - w].open || epoch_of[1 - w] < epoch_of[w]);
    last++;
    stream[last].writer = w;
    stream[last].item = i;
    stream[last].truth = stream[last - 1].truth + (i > MARK -> 1 : 0);
    stream[last].lsn = (i == EPOCH -> 0 : writers[w].lsns[i]);
    assert(count[w * ITEMS + i] == 0);
    count[w * ITEMS + i] = 1
}

byte epoch_of[2];       /* where the epochs stand, as their writers know; 0: not yet */
byte count[2 * ITEMS];  /* how often an item stands in the stream */

#define arrives(w, i) (writers[w].sent[i] == last + 1 && last + 1 < PLACES)

inline may_answer(w, i) {
    if
    :: writers[w].waits == i + 1 && writers[w].answer == NONE -> writers[w].answer = OK
    :: skip
    fi
}

#define ITEM(w, i) atomic { arrives(w, i) -> deliver(w, i); may_answer(w, i) }

/* For each writer.  What would not fit is not delivered: it changes nothing. */
proctype Network(byte w) {
    byte i;
end:
    do
    :: ITEM(w, MARK)
    :: ITEM(w, MARK + 1)
#if BATCHES > 1
    :: ITEM(w, MARK + 2)
#endif
#if BATCHES > 2
    :: ITEM(w, MARK + 3)
#endif
    :: atomic {         /* an epoch record; what is answered is its newest try */
        last + 1 < PLACES && writers[w].epochs[last] ->
            if
            :: writers[w].sent[EPOCH] == last + 1 -> deliver(w, EPOCH); may_answer(w, EPOCH)
            :: else -> deliver(w, EPOCH)
            fi
       }
    :: atomic {         /* it is refused: it does not fit, or a server that is behind thinks so */
        writers[w].waits != 0 && writers[w].answer == NONE -> writers[w].answer = CONFLICT
       }
    :: atomic {         /* a purge arrives, however late */
        writers[w].purge > first ->
            first = writers[w].purge;
            assert(stream[first - 1].truth <= snapshot)
       }
    :: atomic { (writers[0].done && writers[1].done) -> break }
    od;
    /* What is under way may still arrive; then what users were told is held against the stream. */
    do
    :: ITEM(w, MARK)
    :: ITEM(w, MARK + 1)
#if BATCHES > 1
    :: ITEM(w, MARK + 2)
#endif
#if BATCHES > 2
    :: ITEM(w, MARK + 3)
#endif
    :: atomic {
        for (i : MARK .. (ITEMS - 1)) {
            assert(writers[w].told[i] != ABSENT || count[w * ITEMS + i] == 0);
            assert(writers[w].told[i] != DURABLE || count[w * ITEMS + i] == 1)
        }
        break
       }
    od
}

/* What stands before a position: the LSN of the newest frame there. */
inline read_tail(before, lsn) {
    p = before;
    do
    :: p > first && (stream[p - 1].item == EPOCH) -> p--
    :: else -> break
    od;
    if
    :: p > first -> lsn = stream[p - 1].lsn
    :: else ->
        assert(first == 1);     /* or nobody knows any more where the log goes on */
        lsn = 0
    fi;
    p = 0
}

proctype Owner(byte me) {
    byte after, p, tries, item, lsn, mark;

    /* -- open: the epoch record, with nothing read before -- */
    atomic {
        after = last;
#ifdef TAIL_FIRST
        read_tail(last + 1, lsn);
#endif
    }
#ifdef NO_EPOCH
    atomic { read_tail(last + 1, lsn); after = last; epoch_of[me] = last + 1; writers[me].open = true }
#else
    tries = 0;
    do
    :: atomic { tries < TRIES + 1 ->
        writers[me].epochs[after] = true;
        writers[me].sent[EPOCH] = after + 1;
        writers[me].answer = NONE;
        writers[me].waits = EPOCH + 1 };
        if
        :: atomic { writers[me].answer == OK ->
            epoch_of[me] = after + 1; break }
        :: atomic { writers[me].answer == CONFLICT ->
            if
            :: stream[after + 1].writer == me && stream[after + 1].item == EPOCH && last > after ->
                epoch_of[me] = after + 1; break
            :: else -> after = last; tries++        /* a hint, perhaps of something in flight */
            fi }
        :: atomic { tries++ }           /* no answer */
        fi
    :: atomic { tries >= TRIES + 1 -> goto ended }
    od;
    atomic {
        writers[me].waits = 0;
        after = epoch_of[me];
        if
        :: after < first -> goto ended  /* another has taken it over, and purged: fenced */
        :: else
        fi;
#ifndef TAIL_FIRST
        read_tail(after, lsn);
#endif
        writers[me].open = true;
        if
        :: epoch_of[1 - me] > epoch_of[me] -> writers[me].open = false
        :: else -> writers[1 - me].open = false
        fi
    }
#endif

    /* -- its mark, and then batches, one in flight -- */
    item = MARK;
    do
    :: item < ITEMS ->
        atomic {
            writers[me].lsns[item] = lsn + (item > MARK -> 1 : 0);
            tries = 0
        }
        do
        :: atomic { tries < TRIES ->
#ifdef NEW_PLACE
            after = last;
#endif
            writers[me].sent[item] = after + 1;
            writers[me].answer = NONE;
            writers[me].waits = item + 1 };
            if
            :: atomic { writers[me].answer == OK -> break }
            :: atomic { writers[me].answer == CONFLICT ->
                if
#ifdef NO_IDENT
                :: last > after -> break
#else
#ifndef ALL_OTHERS
                :: last > after && stream[after + 1].writer == me && stream[after + 1].item == item ->
                    break               /* it had landed */
                :: last > after && !(stream[after + 1].writer == me && stream[after + 1].item == item) ->
#else
                :: last > after ->
#endif
                    writers[me].told[item] = ABSENT;   /* fenced */
                    goto ended
#endif
                :: last <= after -> tries++            /* whoever refused is behind */
                fi }
            :: atomic { tries++ }
            fi
        :: atomic { tries >= TRIES ->
#ifdef CALL_ABSENT
            writers[me].told[item] = ABSENT;
#else
            writers[me].told[item] = UNKNOWN;
#endif
            goto ended }
        od;
        atomic {
            after++;
            writers[me].waits = 0;
            writers[me].told[item] = DURABLE;
            assert(stream[after].writer == me && stream[after].item == item);
            lsn = writers[me].lsns[item];
            assert(lsn == stream[after].truth);
            if
            :: item == MARK -> mark = after
            :: else
            fi;
            item++
        };
        if
        :: atomic { snapshot < lsn -> snapshot = lsn }
        :: skip
        fi;
        if                      /* drop what a snapshot has, but not the mark */
#ifdef PURGE_ALL
        :: atomic { snapshot == lsn -> writers[me].purge = after + 1 }
#else
#ifdef PURGE_AHEAD
        :: atomic { writers[me].purge = mark }
#else
        :: atomic { mark > 1 && stream[mark - 1].truth <= snapshot -> writers[me].purge = mark }
#endif
#endif
        :: skip
        fi
    :: item >= ITEMS -> break
    od;
ended:
    atomic { writers[me].waits = 0; writers[me].answer = NONE; writers[me].done = true }
}

init {
    atomic { run Network(0); run Network(1); run Owner(0); run Owner(1) }
}
