/* Detection over batches of streams: how far each event is from its own stream's past, its tail
   probability, and alarms.

   Deviations. For one target with encoded value x, of which the forecast has mean mu and log
   deviation lambda, and a numeric one's value v as it comes, with r = exp(-1 / memory_events);
   "before" means from the events before this one only:

       weight    W_t = r W_(t-1) + 1; r W_(t-1) if the event lacks the target
       mean      m_t = m_(t-1) + (v - m_(t-1)) / W_t
       errors    e = (x - mu) exp(-lambda), v - m_before, v - the last value before, of the channels
                 `forecast`, `level`, `change`; of a categorical or boolean target e = sqrt(2 nats)
                 of its forecast; 0 without the target, or without a past
       distance  d = the mean of |e|, with this event
       peak      p = the fourth root of the mean over all events of e^4, of forecasts of
                 min(|e|, LIMIT d)^4, where an error with the other sign than this one counts 1 - a
       spread    q = the square root of the mean of min(|e|, LIMIT d)^2
       trust     a = W_before / (W_before + prior_events)
       season    of L events, from a stream's second one on: levels have a new past, with a weight
                 of its own, and e = v - u, where u is h_(t-L) while G_before >= 0, else m_before,
                 and the gain of the season is G_t = r G_(t-1) + |v - m_before| - |v - h_(t-L)|;
                 h_t = h_(t-L) + s / 2, with s = v - h_(t-L) within q_before or |u - h_(t-L)|; v_t
                 while this past has no event; h_(t-L), or in the first season m, if v_t is missing;
                 a first v_t is h of all phases

   An event without a target changes neither its mean, last value nor run. Where a stream is often
   far from its mean, the peak is large: so a |e| / p_before has a light tail, which separates
   events beyond all of the past from others. Each direction has its own, since a value may often
   fall far and never rise; a new stream has one for both. One outlier makes the peak large for
   several times the memory, but not the spread, so that a |e| / q_before orders what follows it:
   levels of several targets have no peaks, since one of many has outliers more often. Outliers of
   forecasts are common, and so limited. |e| / p and |e| / q are at most MAX_DEVIATION. The season
   follows a value by at most half the spread, so that an anomaly is not unusual again one season
   later; while the mean is closer, by more if it is far from it, as after a lasting change.

   Quantities, larger for what is more unusual, are over all targets together, so that they are not
   diluted by many. Of levels and of changes:

       single    the root of the mean over the numeric targets of (a e / p_before)^2, of levels of
                 several targets of (a e / q_before)^2
       average   with g = exp(-1 / AVERAGED_EVENTS) (`models.spec.detection`), the root of
                 E_t = g E_(t-1) + (1 - g) mean over the numeric targets of (a e / q_before)^2

   then the single one of the forecasts of all targets, and that of runs of equal values (a stuck
   sensor): a run n is 0 where the value changes, else one more than before; M_t = max(r M_(t-1),
   n_(t-1) if a run ends at t) is the longest one before, and k the number of the stream's events
   before the run. It is the largest over the targets of

       run       R = k / (k + prior_events) n / max(M, SHORT_RUN), at most MAX_DEVIATION, and
                 1 + 2 log R of a longer run than any before, since lengths have heavy tails

   A target that an event lacks counts as 0; quantities of an event without any are 0, and not
   counted in tails.

   Tails. Each quantity has a tail, pooled over streams (`models.detection.tails`), which says how
   unusual it is among all fitted streams: u = -log P, of runs of D targets at least 0 and
   -log (D P), a bound for the longest of so many. A stream's own tail maps u to its own nats
   y. It counts the stream's events at or above fixed levels l_0 = 0 < l_1 < ... of u. With the
   counts c_0 >= c_1 >= ..., which decay over memory_events, the share of the events above l_(i-1)
   that are also above l_i is

       f_i = (c_i + w_i exp(-(l_i - l_(i-1)))) / (c_(i-1) + w_i),

   the posterior mean of a share with a beta prior, whose mean is that of the pooled tail and whose
   weight is w_i; and y at l_i is -log (f_1 ... f_i), linear in between, and beyond the last level
   as before it, at most MAX_NATS. So a new stream has the pooled tail, its own past replaces it as
   there is evidence at each level, and y does not decrease with u. Counts change after every BLOCK
   of a stream's events, so that the logarithms are computed once for a block; newer events are
   pending. Of a block at most MAX_RARE events count at levels from RARE_NATS on, of averages
   MAX_RARE_AVERAGES: the events of one anomaly are one occurrence, and do not make the next one
   usual.

   The norm of order 3 of all y has a pooled tail again: several large ones count more than one,
   the largest ones most. There is one quantity for all targets rather than one for each, since a
   bound for many of them hides what a few show.

   Every event rounds the state to floats, so that nothing depends on how a stream is cut into
   chunks.
*/

#include "alarms.h"

#include <math.h>
#include <stddef.h>

enum { NUMERIC, BOOLEAN, CATEGORICAL };
enum { LEVEL, CHANGE, KINDS }; /* channels with averages */
enum { MAX_QUANTITIES = 2 * KINDS + 2, MAX_LEVELS = 32 /* of `tail_levels` */ };
enum { BLOCK = 32, PACKED = 4, PACKED_BITS = 6 }; /* PACKED pending counts in a float */

static const double LIMIT = 5.0; /* of errors in spreads and forecasts, in distances */
static const double MAX_DEVIATION = 20.0;
static const double RESOLUTION = 1e-7; /* smallest peak and spread, as a share of the value */
static const double MIN_SCALE = 1e-12; /* added to it, for values of 0 */
static const double MIN_FORECAST_PEAK = 1e-6;
static const double MIN_WEIGHT = 1e-9;       /* a past with no more has no event */
static const double SHORT_RUN = 8.0;         /* a run up to this length is usual in any stream */
static const double MAX_ERROR = 1e18;        /* DEVIATION_LIMIT of `models.spec.heads` */
static const double MAX_LOG_DEVIATION = 7.0; /* LOG_DEVIATION_LIMIT of `models.spec.heads` */
static const double RARE_NATS = 4.5;
static const double MAX_RARE = 2.0, MAX_RARE_AVERAGES = 4.0;

/* What is predicted: its columns in a row, `missing` -1 if every event has it, the first of its
   parameters in a forecast, and their number; a categorical target has one for each code. */
typedef struct {
    int32_t kind, encoded, value, missing, parameter, parameters;
} target_t;

/* -log P is slope x, and from the threshold on base + log(1 + rate (x - threshold)) / shape */
typedef struct {
    double threshold, slope, base, rate, shape;
} tail_t;

/* A level of a stream's own tail; weight and prior of the pooled share between it and the next. */
typedef struct {
    double nats, weight, prior;
} level_t;

/* `models.detection.kernel.Model` has the same fields. */
typedef struct {
    int32_t targets, numeric; /* their numbers */
    int32_t quantities, levels;
    int32_t season_events; /* 0 without a season */
    int32_t row_size;
    parts_t at;
    double decay, fourth_root_decay, block_decay, prior_events, slow;
    const target_t *target;
    const level_t *level;
    const tail_t *tail, *combined; /* of each quantity, and of the norm of their nats; or NULL */
    rule_t alarm;
    columns_t columns;
} model_t;

/* Of the forecasts of all targets, and levels, changes and runs of the numeric ones. */
typedef struct {
    double *errors;  /* e, of runs n; NULL: nothing is kept */
    double *squares; /* of one target: of what is in the single quantity, and of that of runs */
} deviations_t;

static void keep(deviations_t to, int place, double error, double squared) {
    if (to.errors) to.errors[place] = error, to.squares[place] = squared;
}

enum { TARGET = 1, NUMERIC_TARGET = 2 }; /* what an event has */

/* The own nats of one quantity of a stream, linear between levels. */
typedef struct {
    int computed; /* segments, since the counts changed */
    double nats[MAX_LEVELS], slope[MAX_LEVELS];
} line_t;

/* a if it is no number, so that what a forecast without numbers gives is none either */
static double larger(double a, double b) { return b > a ? b : a; }
static double smaller(double a, double b) { return b < a ? b : a; }
static double clamp(double x, double limit) { return larger(smaller(x, limit), -limit); }
static double square(double x) { return x * x; }

static double forecast_error(const target_t *target, double value, const float *parameters) {
    const float *own = parameters + target->parameter;
    if (target->kind == NUMERIC)
        return clamp((value - own[0]) * exp(-clamp(own[1], MAX_LOG_DEVIATION)), MAX_ERROR);
    double nats;
    if (target->kind == BOOLEAN) {
        double logit = own[0];
        nats = larger(logit, 0.0) + log1p(exp(-fabs(logit))) - value * logit;
    } else {
        double largest = own[0], sum = 0.0;
        for (int i = 1; i < target->parameters; i++) largest = larger(largest, own[i]);
        for (int i = 0; i < target->parameters; i++) sum += exp(own[i] - largest);
        int code = (int)smaller(larger(0.0, rint(value)), target->parameters - 1);
        nats = log(sum) + largest - own[code];
    }
    return sqrt(2.0 * larger(nats, 0.0));
}

/* The past of a channel: whether it has an event, one over its weight before this event and after
   it, and its trust. */
typedef struct {
    int has_event;
    double inverse, inverse_after, trust;
} past_t;

static past_t past_of(const model_t *model, double weight, double after) {
    int has_event = weight > MIN_WEIGHT;
    weight = larger(weight, MIN_WEIGHT), after = larger(after, MIN_WEIGHT);
    return (past_t){has_event, 1.0 / weight, 1.0 / after, weight / (weight + model->prior_events)};
}

/* One channel of a target: its parts of the state, and its error at an event. */
typedef struct {
    float *distance, *above, *below;
    double error;
    past_t past;
} channel_t;

/* Updates the distance of a channel; returns min(|e|, LIMIT d). */
static double follow_distance(const model_t *model, const channel_t *channel) {
    double size = fabs(channel->error);
    double distance = model->decay * larger(*channel->distance, 0.0) + size;
    *channel->distance = (float)distance;
    return smaller(size, LIMIT * distance * channel->past.inverse_after);
}

/* Updates the peaks of a channel by |e|, or what counts of it; returns (a e / p_before)^2.
   `smallest`: the square of the smallest p. */
static double follow_peaks(const model_t *model, const channel_t *channel, double counted,
                           double smallest) {
    double e = channel->error, trust = channel->past.trust;
    float *own = e > 0.0 ? channel->above : channel->below;
    float *other = e > 0.0 ? channel->below : channel->above;
    double fourths = square(square(*own));
    double both = fourths + (1.0 - trust) * square(square(*other));
    double scale = larger(sqrt(both * channel->past.inverse), smallest);
    *own = (float)sqrt(sqrt(model->decay * fourths + square(square(counted))));
    *other = (float)(*other * model->fourth_root_decay);
    return square(trust) * smaller(square(e) / scale, square(MAX_DEVIATION));
}

/* Updates the spread of a channel; writes q_before^2, and returns (a e / q_before)^2. `smallest`:
   the square of the smallest q. */
static double follow_spread(const model_t *model, const channel_t *channel, float *spread,
                            double counted, double smallest, double *before) {
    double sum = square(*spread);
    *before = larger(sum * channel->past.inverse, smallest);
    *spread = (float)sqrt(model->decay * sum + square(counted));
    return square(channel->past.trust) *
           smaller(square(channel->error) / *before, square(MAX_DEVIATION));
}

/* Updates the run of a target, and writes its length n; returns what the quantity of runs is the
   largest of. */
static double follow_run(const model_t *model, float *run, float *longest, int present, int is_same,
                         double events_before, double *length) {
    double before = larger(*run, 0.0), ended = present && !is_same ? before : 0.0;
    *longest = (float)larger(model->decay * *longest, ended);
    *length = smaller(present ? (is_same ? before + 1.0 : 0.0) : before, MAX_COUNT);
    *run = (float)*length;
    if (!present) return 0.0;
    double past = larger(events_before - *length, 0.0);
    double trust = past / (past + model->prior_events);
    double ratio = smaller(trust * *length / larger(*longest, SHORT_RUN), MAX_DEVIATION);
    return ratio > 1.0 ? 1.0 + 2.0 * log(ratio) : ratio;
}

/* Updates the state by one event; writes its deviations and quantities, returns which targets it
   has. `phase`: its place in the season's memory. */
static int follow_event(const model_t *model, const float *row, const float *parameters,
                        float *state, int phase, deviations_t deviations, double *quantities) {
    const parts_t *at = &model->at;
    int targets = model->targets, numeric = model->numeric, n = 0, has = 0;
    int entries = targets + KINDS * numeric; /* but runs */
    int is_joint = numeric > 1, peaks = entries - is_joint * numeric; /* levels without peaks */
    double decay = model->decay, events_before = larger(state[at->events], 0.0);
    int has_season = model->season_events && events_before >= model->season_events;
    int is_first = has_season && events_before == model->season_events;
    double forecasts = 0.0, longest_run = 0.0, single[KINDS] = {0.0}, by_spread[KINDS] = {0.0};
    for (int d = 0; d < targets; d++) {
        const target_t *target = model->target + d;
        int present = target->missing < 0 || row[target->missing] == 0.0f;
        if (present) has |= target->kind == NUMERIC ? TARGET | NUMERIC_TARGET : TARGET;
        double before = larger(state[at->weight + d], 0.0), after = decay * before + present;
        state[at->weight + d] = (float)after;
        past_t past = past_of(model, before, after);
        double error = 0.0;
        if (present && past.has_event)
            error = forecast_error(target, row[target->encoded], parameters);
        channel_t forecast = {state + at->distance + d, state + at->peak + d,
                              state + at->peak + peaks + d, error, past};
        double counted = follow_distance(model, &forecast);
        double of_forecast = follow_peaks(model, &forecast, counted, square(MIN_FORECAST_PEAK));
        keep(deviations, d, error, of_forecast), forecasts += of_forecast;
        if (target->kind != NUMERIC) continue;

        double value = present ? clamp(row[target->value], MAX_ERROR) : 0.0;
        float *mean = state + at->mean + n, *rest = state + at->rest + n;
        float *last = state + at->last + n, *season = NULL, *gain = NULL;
        double latest = clamp(*last, MAX_ERROR), level = clamp((double)*mean + *rest, MAX_ERROR);
        double usual = level, at_phase = level, errors[KINDS] = {0.0};
        past_t pasts[KINDS] = {past, past};
        if (model->season_events) {
            season = state + at->season + (int64_t)n * model->season_events;
            gain = state + at->season_gain + n;
            float *own = state + at->season_weight + n;
            double weight = is_first ? 0.0 : larger(*own, 0.0), next = decay * weight + present;
            *own = (float)next, pasts[LEVEL] = past_of(model, weight, next);
            if (has_season) at_phase = clamp(season[phase], MAX_ERROR);
            if (*gain >= 0.0f) usual = at_phase;
        }
        if (present && past.has_event)
            errors[LEVEL] = value - usual, errors[CHANGE] = value - latest;
        double smallest = square(RESOLUTION * fabs(value) + MIN_SCALE), spreads[KINDS];
        for (int k = 0; k < KINDS; k++) {
            int place = targets + k * numeric + n, is_spread = is_joint && k == LEVEL;
            float *distance = state + at->distance + place;
            float *spread = state + at->spread + place - targets;
            float *above = state + at->peak + place - is_joint * numeric, *below = above + peaks;
            if (is_first && k == LEVEL) {
                *distance = *spread = 0.0f;
                if (!is_spread) *above = *below = 0.0f;
            }
            channel_t channel = {distance, above, below, errors[k], pasts[k]};
            counted = follow_distance(model, &channel);
            double of_spread =
                follow_spread(model, &channel, spread, counted, smallest, spreads + k);
            double of_single = of_spread;
            if (!is_spread) of_single = follow_peaks(model, &channel, fabs(errors[k]), smallest);
            keep(deviations, place, errors[k], of_single);
            single[k] += of_single, by_spread[k] += of_spread;
        }
        if (season) {
            double bound = larger(sqrt(spreads[LEVEL]), fabs(at_phase - usual));
            double error = value - at_phase, step = clamp(error, bound) / 2.0;
            if (present) *gain = (float)(decay * *gain + fabs(value - level) - fabs(error));
            double next = has_season && pasts[LEVEL].has_event ? at_phase + step : value;
            for (int i = 0; present && !past.has_event && i < model->season_events; i++)
                season[i] = (float)value;
            season[phase] = (float)(present ? next : at_phase);
        }

        int is_same = past.has_event && value == latest;
        double length, run = follow_run(model, state + at->run + n, state + at->longest + n,
                                        present, is_same, events_before, &length);
        keep(deviations, entries + n, length, square(run));
        longest_run = larger(longest_run, run);
        if (present) {
            level += (value - level) * past.inverse_after;
            *mean = (float)level, *rest = (float)(level - *mean), *last = (float)value;
        }
        n++;
    }
    state[at->events] = (float)smaller(events_before + 1.0, MAX_COUNT);

    for (int k = 0; numeric && k < KINDS; k++) {
        float *average = state + at->average + k;
        *average = (float)(model->slow * *average + (1.0 - model->slow) * by_spread[k] / numeric);
        *quantities++ = has & NUMERIC_TARGET ? sqrt(single[k] / numeric) : 0.0;
        *quantities++ = has & NUMERIC_TARGET ? sqrt(larger(*average, 0.0)) : 0.0;
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

/* A stream's own nats of pooled ones, between a level and the next. `counts`: of one quantity. */
static double own_nats(const model_t *model, const float *counts, line_t *line, int level,
                       double nats) {
    const level_t *levels = model->level;
    if (level > model->levels - 2) level = model->levels - 2;
    for (; line->computed <= level; line->computed++) {
        int i = line->computed;
        double share = larger(counts[(i + 1) * model->quantities], 0.0) + levels[i].prior;
        share /= larger(counts[i * model->quantities], 0.0) + levels[i].weight;
        double step = -log(smaller(share, 1.0));
        line->slope[i] = step / (levels[i + 1].nats - levels[i].nats);
        line->nats[i + 1] = line->nats[i] + step;
    }
    return smaller(line->nats[level] + line->slope[level] * (nats - levels[level].nats), MAX_NATS);
}

/* Updates the counts by one event; returns its nats, writes the cubes of its quantities' nats. */
static double score_event(const model_t *model, const double *quantities, int has, float *state,
                          int *pending, line_t *lines, double *cubes) {
    int size = model->quantities, of_forecasts = model->numeric ? 2 * KINDS : 0;
    float *counts = state + model->at.tail_counts;
    double sum = 0.0;
    for (int q = 0; q < size; q++) {
        double nats = pooled_nats(model->tail + q, quantities[q]);
        /* the longest run of so many targets (Bonferroni) */
        if (q > of_forecasts) nats = larger(nats - log(model->numeric), 0.0);
        int level = 0;
        while (level + 1 < model->levels && model->level[level + 1].nats <= nats) level++;
        double own = own_nats(model, counts + q, lines + q, level, nats);
        sum += cubes[q] = own * own * own;
        if (has & (q == of_forecasts ? TARGET : NUMERIC_TARGET)) pending[level * size + q]++;
    }
    float *block_events = state + model->at.tail_filled;
    *block_events += 1.0f;
    if (*block_events >= BLOCK) {
        *block_events = 0.0f;
        for (int q = 0; q < size; q++) {
            double most_rare = q < of_forecasts && q % 2 ? MAX_RARE_AVERAGES : MAX_RARE;
            int above = 0;
            for (int level = model->levels; level-- > 0;) {
                int i = level * size + q, is_rare = model->level[level].nats >= RARE_NATS;
                above += pending[i];
                double new = smaller(above, is_rare ? most_rare : BLOCK);
                double count = model->block_decay * larger(counts[i], 0.0) + new;
                counts[i] = (float)smaller(count, MAX_COUNT);
                pending[i] = 0;
            }
            lines[q].computed = 0;
        }
    }
    double norm = cbrt(sum);
    return model->combined ? pooled_nats(model->combined, norm) : norm;
}

/* Pending counts of events between a level and the next, at most BLOCK, from whole numbers of which
   floats have each; a restored state may have any, but no count is more than `most`. */
static void unpack_counts(const float *packed, int size, int most, int *counts) {
    for (int i = 0; i < size; i++) {
        int is_packed = packed[i] >= 0.0f && packed[i] < 1 << PACKED * PACKED_BITS;
        int number = is_packed ? (int)packed[i] : 0;
        for (int k = 0; k < PACKED; k++, number >>= PACKED_BITS) {
            int count = number & ((1 << PACKED_BITS) - 1);
            *counts++ = count < most ? count : most;
        }
    }
}

static void pack_counts(const int *counts, int size, float *packed) {
    for (int i = 0; i < size; i++, counts += PACKED) {
        int number = 0;
        for (int k = PACKED; k-- > 0;) number = number << PACKED_BITS | counts[k];
        packed[i] = (float)number;
    }
}

static void reverse(float *values, int64_t size) {
    for (int64_t i = 0; i < size / 2; i++) {
        float value = values[i];
        values[i] = values[size - 1 - i], values[size - 1 - i] = value;
    }
}

/* Arguments of `follow_streams`; arrays are [batch, steps, ...]. Nothing is written of events
   beyond a length. `_Events` of `kernel.py` has the same fields. */
typedef struct {
    int64_t batch, steps, output_size, first; /* columns of `outputs`, the first of the forecast */
    int64_t state_size, part;                 /* columns of `states`, the first of detection */
    const int32_t *lengths;                   /* [batch] */
    const float *rows, *outputs;
    float *states;            /* [batch, state_size], updated */
    float *scored;            /* [batch, steps, columns.size]; NULL: without alarms */
    const double *thresholds; /* [batch, 2], nats and per_event; NULL: those of `columns` */
    double *details; /* NULL, or of each nats, quantities, cubes, `deviations_t` */
} events_t;

/* Follows one stream; returns how many alarms opened. */
static int follow_stream(const model_t *model, const events_t *events, int64_t b) {
    int64_t entries = model->targets + (int64_t)(KINDS + 1) * model->numeric;
    int64_t details_size = 1 + 2 * (entries + model->quantities);
    int64_t season = model->season_events ? model->season_events : 1, length = events->lengths[b];
    const double *own = events->thresholds ? events->thresholds + 2 * b : model->columns.thresholds;
    float *state = events->states + b * events->state_size + events->part;
    float *block_events = state + model->at.tail_filled;
    if (!(*block_events >= 0.0f && *block_events < BLOCK)) *block_events = 0.0f; /* as restored */
    float *packed = state + model->at.tail_pending;
    int pending[MAX_LEVELS * MAX_QUANTITIES];
    int packed_size = (model->levels * model->quantities + PACKED - 1) / PACKED;
    unpack_counts(packed, packed_size, (int)*block_events, pending);
    line_t lines[MAX_QUANTITIES];
    for (int q = 0; q < model->quantities; q++) lines[q].computed = 0, lines[q].nats[0] = 0.0;
    alarm_t alarm = load_alarm(&model->at, state);
    double unkept[1 + 2 * MAX_QUANTITIES];
    int opened = 0;
    for (int64_t t = 0; t < length; t++) {
        int64_t event = b * events->steps + t;
        double *details = events->details ? events->details + event * details_size : unkept;
        double *quantities = details + 1, *cubes = quantities + model->quantities;
        double *errors = events->details ? cubes + model->quantities : NULL;
        deviations_t deviations = {errors, errors ? errors + entries : NULL};
        const float *row = events->rows + event * model->row_size;
        const float *outputs = events->outputs + event * events->output_size;
        int has = follow_event(model, row, outputs + events->first, state, (int)(t % season),
                               deviations, quantities);
        if (!model->tail) continue;
        double nats = *details = score_event(model, quantities, has, state, pending, lines, cubes);
        if (!events->scored) continue;
        int code = follow_alarm(&model->alarm, own[0], own[1], nats, &alarm);
        opened += code == OPENED;
        float *scored = events->scored + event * model->columns.size;
        write_outputs(&model->columns, outputs, nats, code, own[0], &alarm, scored);
    }
    store_alarm(&model->at, state, alarm);
    pack_counts(pending, packed_size, packed);
    /* the oldest value comes first again */
    int64_t passed = length % season;
    for (int n = 0; model->season_events && n < model->numeric; n++) {
        float *window = state + model->at.season + n * season;
        reverse(window, passed), reverse(window + passed, season - passed), reverse(window, season);
    }
    return opened;
}

/* CRC-32 of the files that this library is compiled from. */
const uint32_t sources = SOURCES;

/* Follows the next events of streams; returns how many alarms opened. */
int follow_streams(const model_t *model, const events_t *events) {
    int opened = 0;
    for (int64_t b = 0; b < events->batch; b++) opened += follow_stream(model, events, b);
    return opened;
}
