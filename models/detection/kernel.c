/* Follows streams of events: how far each event is from its stream's own past, and how usual that is.

   Equations, for one target with encoded value x, of which the forecast has mean mu and log deviation
   s, and a numeric one's value v as it comes, with r = exp(-1 / memory_events); "before" means from
   the events before this one only:

       weight    W_t = r W_(t-1) + 1
       mean      m_t = m_(t-1) + (v - m_(t-1)) / W_t
       errors    e = (x - mu) exp(-s), v - m_before, v - v_(the event before), v - s_(a season before),
                 of the channels `forecast`, `level`, `change`, `season`; of a categorical or boolean
                 target e = sqrt(2 nats) of its forecast
       distance  d = the mean of |e|, with this event
       peak      p = the fourth root of the mean of e^4 of the errors with the sign of this one, and of
                 those with the other sign with weight 1 - a; of all errors of a forecast
       spread    q = the square root of the mean of min(|e|, LIMIT d)^2
       trust     a = W_before / (W_before + prior_events)
       season    s_t = v_t if a e / q_before of the channel is usual, else s_(t-L), for a season of L

   Means have the weights of the stream, those of the channel `season` start one season later. Where a
   stream is often far from its mean, the peak is large: so a |e| / p_before has a light tail, which
   separates events beyond all of the past from others. Each direction has its own, since a value may
   often fall far and never rise; a new stream has one for both. One outlier makes the peak large for
   several times the memory, but not the spread, so that a |e| / q_before orders what follows it.
   |e| / p and |e| / q are at most LARGEST. The mean is stored as two floats, so that a large offset of
   a stream costs no digits. The season remembers the last usual value at each phase, so that an
   anomaly is not unusual again one season later.

   The quantities, larger for what is more unusual, are over all targets together, so that they are not
   diluted by many. Of levels, of changes and of seasons:

       single    the root of the mean over the targets of (a e / p_before)^2
       averages  for each of the SCALES, with its decay g, the root of
                 E_t = g E_(t-1) + (1 - g) mean over the targets of (a e / q_before)^2

   then the single one of forecasts, and that of runs of equal values (a stuck sensor): a run n is 0
   where the value changes, else one more than before; M_t = max(r M_(t-1), n_(t-1) if a run ends at
   t) is the longest one before, and k the number of the stream's events before the run. It is the
   largest over the targets of

       run       k / (k + prior_events) n / max(M, SHORT_RUN), at most LARGEST

   A target that an event does not have counts as 0.

   Each quantity has a tail, pooled over streams (`models.detection.tails`), which says how unusual it
   is among all fitted streams: u = -log P. A stream's own tail maps u to its own nats n. It counts the
   stream's events above fixed levels l_0 = 0 < l_1 < ... of u. With the counts c_0 >= c_1 >= ..., which
   decay over memory_events, the share of the events above l_(i-1) that are also above l_i is

       q_i = (c_i + a_i exp(-(l_i - l_(i-1)))) / (c_(i-1) + a_i),

   the mean of a beta distribution whose prior, of weight a_i, is the pooled tail; and n at l_i is
   -log (q_1 ... q_i), linear in between, and beyond the last level as before it. So a new stream has
   the pooled tail, its own past replaces it as there is evidence at each level, and n increases with
   u. Counts change after every BLOCK of a stream's events; until then theirs are pending.

   The norm of order 3 of the quantities' n has a pooled tail again: several large ones count more than
   one, the largest ones most. There is one quantity for all targets rather than one for each, since a
   bound for many of them hides what a few show.

   Every event rounds the state to floats, so that nothing depends on how a stream is cut into chunks.
*/

#include <math.h>
#include <stdint.h>

#include "alarms.h"

enum { NUMERIC, BOOLEAN, CATEGORICAL };
enum { SCALES = 2, MAX_KINDS = 3, MAX_QUANTITIES = MAX_KINDS * (1 + SCALES) + 2, MAX_LEVELS = 32, BLOCK = 32 };

static const double LIMIT = 5.0;              /* largest error that the spread counts, in distances */
static const double LARGEST = 20.0;           /* largest deviation */
static const double RESOLUTION = 1e-7;        /* smallest peak and spread, as a share of the value */
static const double LEAST_SPREAD = 1e-12;     /* added to it, for values of 0 */
static const double LEAST_FORECAST = 1e-6;    /* smallest peak of forecasts */
static const double LEAST_WEIGHT = 1e-9;      /* a past with no more than it has no event */
static const double USUAL_SQUARE = 16.0;      /* the season remembers values with at most this (a e / q)^2 */
static const double SHORT_RUN = 8.0;          /* a run up to this length is usual in any stream */
static const double MAX_ERROR = 1e18;         /* of values and forecasts, so that sums stay finite */
static const double MAX_LOG_DEVIATION = 7.0;  /* as the head bounds it */
static const double MAX_COUNT = 1 << 24;      /* largest number of events that a float counts */
static const double MAX_NATS = 60.0;          /* tail probabilities are no smaller than exp(-60) */
static const double SMALLEST_SHARE = 1e-12;   /* of events above one level that are above the next */

/* What is predicted: its columns in a row, `missing` -1 if every event has it, its place among the
   parameters of a forecast, and how many categories it has. */
typedef struct {
    int32_t kind, encoded, value, missing, parameter, categories;
} target_t;

/* -log P up to the threshold is `slope` x, beyond it base + log(1 + rate (x - threshold)) / shape. */
typedef struct {
    double threshold, slope, base, rate, shape;
} tail_t;

/* A level of a stream's own tail; weight and prior of the pooled share between it and the next. */
typedef struct {
    double nats, weight, prior;
} level_t;

/* Where each part of a stream's state begins; -1 of those that it lacks. */
typedef struct {
    int32_t events, weight, last, mean, rest, distance, spread, peak, average, run, longest, season,
        season_weight, tail_counts, tail_pending, tail_filled, alarm, alarm_since, alarm_excess, alarm_events,
        alarm_nats;
} parts_t;

/* `models.detection.kernel.Model` has the same fields. */
typedef struct {
    int32_t targets, numeric, kinds, quantities, levels, season_events; /* kinds: those with averages */
    int32_t row_size, state_size;
    parts_t at;
    double decay, fourth_root_decay, block_decay, prior_events, slow[SCALES];
    const target_t *target;
    const level_t *level;
    const tail_t *tail, *combined; /* of each quantity, and of the norm of their nats, or 0 */
    rule_t alarm;
} model_t;

/* Of the rows: forecasts of all targets, levels, changes, seasons and runs of the numeric ones. */
typedef struct {
    double *errors, *squares; /* e, of runs n; (a e / p_before)^2, of runs the square of their quantity */
} deviations_t;

enum { TARGET = 1, NUMERIC_TARGET = 2 }; /* what an event has */

/* The own nats of one quantity of a stream: linear between levels, as far as they are known. */
typedef struct {
    int known;
    double nats[MAX_LEVELS], slope[MAX_LEVELS];
} line_t;

static double larger(double a, double b) { return a > b ? a : b; }
static double smaller(double a, double b) { return a < b ? a : b; }
static double limited(double x, double most) { return larger(smaller(x, most), -most); }
static double square(double x) { return x * x; }

static double forecast_error(const target_t *target, double value, const float *parameters) {
    const float *own = parameters + target->parameter;
    if (target->kind == NUMERIC)
        return limited((value - own[0]) * exp(-limited(own[1], MAX_LOG_DEVIATION)), MAX_ERROR);
    double nats;
    if (target->kind == BOOLEAN) {
        double logit = own[0];
        nats = larger(logit, 0.0) + log1p(exp(-fabs(logit))) - value * logit;
    } else {
        double largest = own[0], sum = 0.0;
        for (int i = 1; i < target->categories; i++) largest = larger(largest, own[i]);
        for (int i = 0; i < target->categories; i++) sum += exp(own[i] - largest);
        int code = (int)smaller(larger(rint(value), 0.0), target->categories - 1);
        nats = log(sum) + largest - own[code];
    }
    return sqrt(2.0 * larger(nats, 0.0));
}

/* The past of a channel: one over its weight before an event and after it, and its trust. */
typedef struct {
    double inverse, inverse_after, trust;
} past_t;

static past_t past_of(const model_t *model, double weight, double after) {
    weight = larger(weight, LEAST_WEIGHT), after = larger(after, LEAST_WEIGHT);
    return (past_t){1.0 / weight, 1.0 / after, weight / (weight + model->prior_events)};
}

/* (a e / p_before)^2 of a forecast. */
static double follow_forecast(double decay, float *peak, double e, past_t past) {
    double fourths = square(square(*peak));
    double scale = larger(sqrt(fourths * past.inverse), square(LEAST_FORECAST));
    *peak = (float)sqrt(sqrt(decay * fourths + square(square(e))));
    return square(past.trust) * smaller(square(e) / scale, square(LARGEST));
}

/* One channel of a numeric target: its parts of the state, and its error at an event. */
typedef struct {
    float *distance, *spread, *above, *below;
    double error;
    past_t past;
} channel_t;

/* (a e / p_before)^2 and (a e / q_before)^2; `least`: the square of the smallest p and q. */
static void follow_channel(const model_t *model, const channel_t *channel, double least, double *by_peak,
                           double *by_spread) {
    double e = channel->error, size = fabs(e), squared = square(e), largest = square(LARGEST);
    double trust = square(channel->past.trust);
    float *own = e > 0.0 ? channel->above : channel->below, *other = e > 0.0 ? channel->below : channel->above;
    double fourths = square(square(*own)), spread = square(*channel->spread);
    double both = fourths + (1.0 - channel->past.trust) * square(square(*other));
    *by_peak = trust * smaller(squared / larger(sqrt(both * channel->past.inverse), least), largest);
    *by_spread = trust * smaller(squared / larger(spread * channel->past.inverse, least), largest);
    double distance = model->decay * larger(*channel->distance, 0.0) + size;
    *channel->distance = (float)distance;
    double counted = smaller(size, LIMIT * distance * channel->past.inverse_after);
    *channel->spread = (float)sqrt(model->decay * spread + square(counted));
    *own = (float)sqrt(sqrt(model->decay * fourths + square(squared)));
    *other = (float)(*other * model->fourth_root_decay);
}

/* n, and what the quantity of runs is the largest of. */
static double follow_run(const model_t *model, float *run, float *longest, int present, int is_same, double passed,
                         double *length) {
    double before = larger(*run, 0.0);
    int is_end = present && !is_same;
    *longest = (float)larger(model->decay * *longest, is_end ? before : 0.0);
    *length = smaller(present ? (is_same ? before + 1.0 : 0.0) : before, MAX_COUNT);
    *run = (float)*length;
    if (!present) return 0.0;
    double past = larger(passed - *length, 0.0);
    return smaller(*length / larger(*longest, SHORT_RUN) * past / (past + model->prior_events), LARGEST);
}

/* The quantities of one event, and which targets it has; `slot`: its phase in the season's memory. */
static int follow_event(const model_t *model, const float *row, const float *parameters, float *state, int slot,
                        deviations_t found, double *quantities) {
    const parts_t *at = &model->at;
    int targets = model->targets, numeric = model->numeric, kinds = model->kinds, n = 0, has = 0;
    double decay = model->decay, passed = state[at->events];
    double forecasts = 0.0, longest_run = 0.0, by_peak[MAX_KINDS] = {0.0}, by_spread[MAX_KINDS] = {0.0};
    for (int d = 0; d < targets; d++) {
        const target_t *target = model->target + d;
        int present = target->missing < 0 || row[target->missing] == 0.0f;
        if (present) has |= target->kind == NUMERIC ? TARGET | NUMERIC_TARGET : TARGET;
        double before = larger(state[at->weight + d], 0.0), after = decay * before + present;
        state[at->weight + d] = (float)after;
        int has_past = before > LEAST_WEIGHT;
        past_t past = past_of(model, before, after);
        double error = 0.0;
        if (present && has_past) error = forecast_error(target, row[target->encoded], parameters);
        found.errors[d] = error;
        found.squares[d] = follow_forecast(decay, state + at->peak + d, error, past);
        forecasts += found.squares[d];
        if (target->kind != NUMERIC) continue;

        double value = present ? limited(row[target->value], MAX_ERROR) : 0.0;
        float *last = state + at->last + n, *mean = state + at->mean + n, *rest = state + at->rest + n;
        double latest = limited(*last, MAX_ERROR), level = limited((double)*mean + *rest, MAX_ERROR);
        double errors[MAX_KINDS] = {0.0};
        past_t pasts[MAX_KINDS] = {past, past, past};
        if (present && has_past) errors[0] = value - level, errors[1] = value - latest;
        float *remembered = 0;
        double usual = latest;
        if (kinds == MAX_KINDS) {
            float *own = state + at->season_weight + n;
            remembered = state + at->season + (int64_t)n * model->season_events + slot;
            int is_known = passed >= model->season_events;
            if (is_known) usual = limited(*remembered, MAX_ERROR);
            if (is_known && present) errors[2] = value - usual;
            double of_season = larger(*own, 0.0), after_it = decay * of_season + (is_known && present);
            *own = (float)after_it;
            pasts[2] = past_of(model, of_season, after_it);
        }
        double least = square(RESOLUTION * fabs(value) + LEAST_SPREAD), of_peak, of_spread = 0.0;
        for (int k = 0; k < kinds; k++) {
            int place = k * numeric + n, peak = at->peak + targets + place;
            channel_t channel = {
                .distance = state + at->distance + place,
                .spread = state + at->spread + place,
                .above = state + peak,
                .below = state + peak + kinds * numeric,
                .error = errors[k],
                .past = pasts[k],
            };
            follow_channel(model, &channel, least, &of_peak, &of_spread);
            by_peak[k] += of_peak, by_spread[k] += of_spread;
            found.errors[targets + place] = errors[k], found.squares[targets + place] = of_peak;
        }
        if (remembered) *remembered = (float)(present && of_spread <= USUAL_SQUARE ? value : usual);

        double length;
        int place = targets + kinds * numeric + n, is_same = has_past && value == latest;
        double run = follow_run(model, state + at->run + n, state + at->longest + n, present, is_same, passed, &length);
        found.errors[place] = length, found.squares[place] = square(run);
        longest_run = larger(longest_run, run);
        if (present) {
            level += (value - level) * past.inverse_after;
            *mean = (float)level, *rest = (float)(level - *mean), *last = (float)value;
        }
        n++;
    }
    state[at->events] = (float)smaller(passed + 1.0, MAX_COUNT);

    for (int k = 0; k < kinds; k++) {
        *quantities++ = has & NUMERIC_TARGET ? sqrt(by_peak[k] / numeric) : 0.0;
        for (int scale = 0; scale < SCALES; scale++) {
            float *average = state + at->average + scale * kinds + k;
            double slow = model->slow[scale];
            *average = (float)(slow * *average + (1.0 - slow) * by_spread[k] / numeric);
            *quantities++ = has & NUMERIC_TARGET ? sqrt(larger(*average, 0.0)) : 0.0;
        }
    }
    *quantities++ = sqrt(forecasts / targets);
    if (numeric) *quantities = longest_run;
    return has;
}

static double pooled_nats(const tail_t *tail, double x) {
    double nats = x * tail->slope;
    if (nats <= tail->base) return nats;
    return smaller(tail->base + log1p(tail->rate * (x - tail->threshold)) / tail->shape, MAX_NATS);
}

/* A stream's own nats of pooled ones, between a level and the next; `counts`: of the quantity. */
static double own_nats(const model_t *model, const float *counts, line_t *line, int level, double nats) {
    const level_t *levels = model->level;
    if (level > model->levels - 2) level = model->levels - 2;
    for (; line->known <= level; line->known++) {
        int i = line->known;
        double share = larger(counts[(i + 1) * model->quantities], 0.0) + levels[i].prior;
        share /= larger(counts[i * model->quantities], 0.0) + levels[i].weight;
        double step = -log(smaller(larger(share, SMALLEST_SHARE), 1.0));
        line->slope[i] = step / (levels[i + 1].nats - levels[i].nats);
        line->nats[i + 1] = line->nats[i] + step;
    }
    return smaller(line->nats[level] + line->slope[level] * (nats - levels[level].nats), MAX_NATS);
}

/* The nats of one event, and the cubes of its quantities' own ones. */
static double score_event(const model_t *model, const double *quantities, int has, float *state, line_t *lines,
                          double *cubes) {
    int size = model->quantities, of_forecasts = model->kinds * (1 + SCALES);
    float *counts = state + model->at.tail_counts, *pending = state + model->at.tail_pending;
    double sum = 0.0;
    for (int q = 0; q < size; q++) {
        double nats = pooled_nats(model->tail + q, quantities[q]);
        int level = 0;
        while (level + 1 < model->levels && model->level[level + 1].nats <= nats) level++;
        double own = own_nats(model, counts + q, lines + q, level, nats);
        sum += cubes[q] = own * own * own;
        if (has & (q == of_forecasts ? TARGET : NUMERIC_TARGET))
            for (int i = 0; i <= level; i++) pending[i * size + q] += 1.0f;
    }
    float *filled = state + model->at.tail_filled;
    *filled += 1.0f;
    if (*filled >= BLOCK) {
        *filled = 0.0f;
        for (int i = 0; i < model->levels * size; i++) {
            double count = model->block_decay * larger(counts[i], 0.0) + larger(pending[i], 0.0);
            counts[i] = (float)smaller(count, MAX_COUNT);
            pending[i] = 0.0f;
        }
        for (int q = 0; q < size; q++) lines[q].known = 0;
    }
    double norm = cbrt(sum);
    return model->combined ? pooled_nats(model->combined, norm) : norm;
}

static void reverse(float *values, int64_t size) {
    for (int64_t i = 0; i < size / 2; i++) {
        float value = values[i];
        values[i] = values[size - 1 - i], values[size - 1 - i] = value;
    }
}

static alarm_t load_alarm(const parts_t *at, const float *state) {
    alarm_t alarm = {.number = state[at->alarm]};
    if (at->alarm_since >= 0) alarm.since = state[at->alarm_since], alarm.excess = state[at->alarm_excess];
    if (at->alarm_nats >= 0) {
        alarm.events = state[at->alarm_events];
        alarm.peak = state[at->alarm_nats], alarm.latest = state[at->alarm_nats + 1];
    }
    return alarm;
}

static void store_alarm(const parts_t *at, float *state, alarm_t alarm) {
    state[at->alarm] = alarm.number;
    if (at->alarm_since >= 0) state[at->alarm_since] = alarm.since, state[at->alarm_excess] = alarm.excess;
    if (at->alarm_nats >= 0) {
        state[at->alarm_events] = alarm.events;
        state[at->alarm_nats] = alarm.peak, state[at->alarm_nats + 1] = alarm.latest;
    }
}

/* What follows `batch` streams over up to `steps` events each reads and writes; arrays are
   [batch, steps, ...]. */
typedef struct {
    int64_t batch, steps, stride; /* stride: floats from the parameters of an event to the next's */
    const int64_t *lengths;       /* [batch] */
    const float *rows, *parameters;
    const double *thresholds, *per_event; /* [batch], of alarms: see `follow_alarm`; 0 without alarms */
    float *states;                        /* [batch, ...], updated */
    double *errors, *squares, *quantities;
    double *cubes, *nats; /* without tails they are not written */
    float *alarms;        /* [batch, steps, 3], code, peak, and events since it opened; 0 without one */
    int64_t *opened;      /* [batch], the last event that opened an alarm, -1 if none did */
} events_t;

static void follow_stream(const model_t *model, const events_t *events, int64_t b) {
    int64_t deviations = model->targets + (int64_t)(model->kinds + 1) * model->numeric;
    int64_t season = model->season_events ? model->season_events : 1, length = events->lengths[b];
    float *state = events->states + b * model->state_size, *filled = state + model->at.tail_filled;
    if (!(*filled >= 0.0f && *filled < BLOCK)) *filled = 0.0f; /* as restored */
    line_t lines[MAX_QUANTITIES];
    for (int q = 0; q < model->quantities; q++) lines[q].known = 0, lines[q].nats[0] = 0.0;
    alarm_t alarm = load_alarm(&model->at, state);
    events->opened[b] = -1;
    for (int64_t t = 0; t < length; t++) {
        int64_t event = b * events->steps + t, at = event * model->quantities;
        deviations_t found = {events->errors + event * deviations, events->squares + event * deviations};
        double *quantities = events->quantities + at;
        int has = follow_event(model, events->rows + event * model->row_size,
                               events->parameters + event * events->stride, state, (int)(t % season), found, quantities);
        if (!model->tail) continue;
        double nats = score_event(model, quantities, has, state, lines, events->cubes + at);
        events->nats[event] = nats;
        if (!events->thresholds) continue;
        int code = follow_alarm(&model->alarm, events->thresholds[b], events->per_event[b], nats, &alarm);
        if (code == OPENED) events->opened[b] = t;
        float *of_alarm = events->alarms + 3 * event;
        if (code != NONE) of_alarm[0] = (float)code, of_alarm[1] = alarm.peak, of_alarm[2] = alarm.events;
    }
    store_alarm(&model->at, state, alarm);
    /* the oldest value first */
    int64_t passed = length % season;
    for (int n = 0; model->season_events && n < model->numeric; n++) {
        float *window = state + model->at.season + n * season;
        reverse(window, passed), reverse(window + passed, season - passed), reverse(window, season);
    }
}

void follow_streams(const model_t *model, const events_t *events) {
    for (int64_t b = 0; b < events->batch; b++) follow_stream(model, events, b);
}
