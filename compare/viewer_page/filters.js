// ---------------------------------------------------------------- filters and order

const NONE = {
  phase: '', arm: '', seed: '', run: '', kind: '', seen: '', result: '', stop: '', fault: '',
  followed: '', from: '', to: '', least: '', most: '', words: '',
};
const filters = {...NONE};
const order = {by: 'step', down: true};
let shown = new Int32Array(0);  // the episodes that pass, in order
let found = null;  // with a search: a byte an episode
let foundWords = '';

const FAULTS = {
  any: (marks) => marks !== 0,
  none: (marks) => marks === 0,
  model: (marks) => marks & FAULT_MODEL,
  infrastructure: (marks) => marks & FAULT_INFRASTRUCTURE,
  fatal: (marks) => marks & FATAL,
  masked: (marks) => marks & MASKED,
  unread: (marks) => marks & UNREAD,
};
const FAULT_WORDS = {
  any: 'any of these', none: 'none', model: "the policy's call", infrastructure: 'a service failed',
  fatal: 'service dead (3 in a row)', masked: 'turns without loss', unread: 'a result did not fit',
};
const ORDERS = {
  step: ['Step', (i) => column.step[i]],
  reward: ['Reward', (i) => column.reward[i] ?? -Infinity],
  tokens: ['Length', (i) => column.tokens[i]],
  calls: ['Calls', (i) => column.calls[i]],
  question: ['Question', (i) => column.question[i]],
};

// Fields with more than one value to choose from: [name, label, [[value, words], ...]].
function choices() {
  const distinct = (values) => [...new Set(values)].sort((a, b) => a - b);
  const names = (values) => values.map((value, n) => [String(n), value]);
  const seeds = distinct(index.runs.map((run) => run.seed));
  const marks = distinct(column.marks);
  const fields = [
    ['phase', 'Phase', [['eval', 'evaluation'], ['train', 'training']]
      .filter(([name]) => column.is_training.includes(name === 'train' ? 1 : 0))],
    ['arm', 'Arm', names(index.arms.map((arm) => arm.name))],
    ['seed', 'Seed', seeds.map((seed) => [String(seed), String(seed)])],
    ['run', 'Run', names(index.runs.map((run) => run.name))],
    ['kind', 'Kind', names(index.kinds.map((kind) => kind || 'none'))],
    ['seen', 'Place', [['1', 'seen'], ['0', 'unseen']].filter(([v]) => column.seen.includes(+v))],
    ['result', 'Answer', ['right', 'wrong', 'unscored'].filter((name) => results().has(name))
      .map((name) => [name, name])],
    ['stop', 'Ended by', names(index.stops.map((stop) => stop || 'none'))],
    ['fault', 'Faults', Object.entries(FAULT_WORDS)
      .filter(([name]) => marks.some((mark) => FAULTS[name](mark)))],
    ['followed', 'Followed', column.followed.includes(1) ? [['1', 'followed'], ['0', 'others']] : []],
  ];
  return fields.filter(([, , options]) => options.length > 1);
}

function results() {
  return new Set(column.right.map((right) => (right === null ? 'unscored' : right ? 'right' : 'wrong')));
}

function passes(i) {
  const f = filters, run = index.runs[column.run[i]], reward = column.reward[i];
  return (!f.phase || f.phase === phaseOf(i))
    && (!f.arm || +f.arm === run.arm)
    && (!f.seed || +f.seed === run.seed)
    && (!f.run || +f.run === column.run[i])
    && (!f.kind || +f.kind === column.kind[i])
    && (!f.seen || +f.seen === column.seen[i])
    && (!f.result || f.result === result(i))
    && (!f.stop || +f.stop === column.stop[i])
    && (!f.fault || FAULTS[f.fault]?.(column.marks[i]))
    && (!f.followed || +f.followed === column.followed[i])
    && (f.from === '' || column.step[i] >= +f.from)
    && (f.to === '' || column.step[i] <= +f.to)
    && (f.least === '' || (reward !== null && reward >= +f.least))
    && (f.most === '' || (reward !== null && reward <= +f.most))
    && (found === null || found[i] === 1);
}

function select() {
  const kept = [];
  for (let i = 0; i < index.size; i++) if (passes(i)) kept.push(i);
  const key = ORDERS[order.by][1], sign = order.down ? -1 : 1;
  // equal ones stay by run, then as they were asked
  kept.sort((a, b) => sign * (key(a) - key(b)) || column.run[a] - column.run[b] || a - b);
  shown = Int32Array.from(kept);
}

// Looks through all chunks; false if another search has begun meanwhile.
async function lookFor(words) {
  foundWords = words = words.trim().toLowerCase();
  if (!words) {
    found = null;
    return true;
  }
  const hits = new Uint8Array(index.size);
  for (let number = 0; number < index.chunks.length; number++) {
    const matches = await matchesIn(number, words);
    if (foundWords !== words) return false;
    matches.forEach((is, place) => { hits[firstOfChunk[number] + place] = is ? 1 : 0; });
  }
  for (let i = 0; i < index.size; i++) {
    if (index.questions[column.question[i]].id.toLowerCase().includes(words)) hits[i] = 1;
  }
  found = hits;
  return true;
}

// ---------------------------------------------------------------- the form

function drawFilters() {
  const fields = choices().map(([name, label, options]) => h('label', {}, h('span', {}, label),
    h('select', {data: {filter: name}, onchange: (event) => setFilter(name, event.target.value)},
      h('option', {value: ''}, 'all'),
      options.map(([value, words]) => h('option', {value}, plain(words))))));
  const number = (name, label, step) => h('input', {
    type: 'number', step, placeholder: label, 'aria-label': label, data: {filter: name},
    oninput: (event) => setFilter(name, event.target.value),
  });
  fields.push(h('label', {class: 'range', role: 'group', 'aria-label': 'Steps'}, h('span', {}, 'Steps'),
    number('from', 'from', 1), number('to', 'to', 1)));
  fields.push(h('label', {class: 'range', role: 'group', 'aria-label': 'Reward'}, h('span', {}, 'Reward'),
    number('least', 'from', 'any'), number('most', 'to', 'any')));
  fill($('filter-fields'), fields, h('button', {type: 'button', id: 'clear', onclick: clearFilters}, 'Clear all'));
  showFilters();
}

function showFilters() {
  for (const field of document.querySelectorAll('[data-filter]')) {
    if (field !== document.activeElement) field.value = filters[field.dataset.filter];
  }
  const n = Object.entries(filters).filter(([name, value]) => value !== '' && name !== 'words').length;
  $('filters-title').textContent = n ? `Filters (${n} set)` : 'Filters';
  $('filters').classList.toggle('active', n > 0);
  if ($('search') !== document.activeElement) $('search').value = filters.words;
}

function setFilter(name, value) {
  filters[name] = value;
  refresh();
}

function clearFilters() {
  Object.assign(filters, NONE);
  found = null;
  foundWords = '';
  $('search').value = '';
  refresh();
}

// ---------------------------------------------------------------- what the filtered set is like

const GROUPS = {
  run: ['Run', (i) => column.run[i], (n) => index.runs[n].name],
  arm: ['Arm', (i) => index.runs[column.run[i]].arm, (n) => index.arms[n].name],
  step: ['Step', (i) => column.step[i], String],
  kind: ['Kind', (i) => column.kind[i], (n) => index.kinds[n] || 'none'],
  seen: ['Place', (i) => column.seen[i], (n) => (n ? 'seen' : 'unseen')],
  stop: ['Ended by', (i) => column.stop[i], (n) => index.stops[n] || 'none'],
  calls: ['Calls', (i) => column.calls[i], String],
  phase: ['Phase', (i) => column.is_training[i], (n) => (n ? 'training' : 'evaluation')],
};
let groupBy = 'run';

function describe(members) {
  const sums = {n: members.length, scored: 0, right: 0, rewarded: 0, reward: 0, calls: 0, tokens: 0};
  for (const i of members) {
    if (column.right[i] !== null) { sums.scored++; sums.right += column.right[i]; }
    if (column.reward[i] !== null) { sums.rewarded++; sums.reward += column.reward[i]; }
    sums.calls += column.calls[i];
    sums.tokens += column.tokens[i];
  }
  return {
    n: sums.n,
    right: sums.scored ? sums.right / sums.scored : null,
    reward: sums.rewarded ? sums.reward / sums.rewarded : null,
    calls: sums.n ? sums.calls / sums.n : null,
    tokens: sums.n ? sums.tokens / sums.n : null,
  };
}

function drawSummary() {
  const all = describe(shown), stops = new Map();
  for (const i of shown) stops.set(column.stop[i], (stops.get(column.stop[i]) || 0) + 1);
  const ended = [...stops].sort((a, b) => b[1] - a[1]);
  fill($('summary'),
    h('p', {}, h('strong', {id: 'n-shown'}, count(shown.length)),
      shown.length === index.size ? ' episodes' : ` of ${count(index.size)} episodes`),
    shown.length > 0 && h('dl', {},
      figure('right', all.right === null ? '–' : percent(all.right)),
      figure('reward', decimal(all.reward)),
      figure('calls', decimal(all.calls, 1)),
      figure('tokens', decimal(all.tokens, 0))),
    shown.length > 0 && h('p', {class: 'stops'}, 'ended by ', ended.map(([stop, n], k) => [k ? ', ' : '',
      `${index.stops[stop] || 'none'} ${percent(n / shown.length)}`])));
  if ($('groups').open) drawGroups();
}

function figure(name, value) {
  return h('div', {}, h('dt', {}, name), h('dd', {data: {figure: name}}, value));
}

function drawGroups() {
  const [, key, words] = GROUPS[groupBy], groups = new Map();
  for (const i of shown) {
    const value = key(i);
    if (!groups.has(value)) groups.set(value, []);
    groups.get(value).push(i);
  }
  const values = [...groups.keys()].sort((a, b) => a - b);
  const table = h('table', {}, h('thead', {}, h('tr', {}, [GROUPS[groupBy][0], 'n', 'right', 'reward', 'calls']
    .map((name) => h('th', {scope: 'col'}, name)))), h('tbody', {}, values.map((value) => {
    const figures = describe(groups.get(value));
    const width = `${100 * (figures.right || 0)}%`;
    return h('tr', {}, h('th', {scope: 'row'}, h('button', {type: 'button', class: 'link', onclick: () => narrow(value)},
      words(value))), h('td', {}, count(figures.n)),
    h('td', {class: 'share', style: {'--share': width}}, figures.right === null ? '–' : percent(figures.right)),
    h('td', {}, decimal(figures.reward)), h('td', {}, decimal(figures.calls, 1)));
  })));
  const menu = h('select', {'aria-label': 'Group by', onchange: (event) => { groupBy = event.target.value; drawGroups(); }},
    Object.entries(GROUPS).map(([name, [label]]) => h('option', {value: name, selected: name === groupBy}, label)));
  fill($('group-table'), h('label', {}, 'Group by ', menu), table);
}

// Takes a group of the table as a filter.
function narrow(value) {
  if (groupBy === 'calls') return;
  if (groupBy === 'step') Object.assign(filters, {from: String(value), to: String(value)});
  else if (groupBy === 'phase') filters.phase = value ? 'train' : 'eval';
  else filters[groupBy] = String(value);
  refresh();
}
